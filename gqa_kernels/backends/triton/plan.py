"""The device plan of a head map: query heads sorted by group, and where each group begins.

The plan is one packed int32 tensor, so that kernels take one pointer and caches one key:

    [ perm: Hq | k_head: Hq | v_head: Hq | offsets: G + 2 ]

``perm`` lists the query heads sorted (stably) by group; ``k_head[i]`` and ``v_head[i]`` are the KV
heads that query head ``perm[i]`` reads; group ``g`` is ``perm[offsets[g]:offsets[g + 1]]``.
Without a value map group ``g`` is KV head ``g`` and ``G = Hk``. With one, groups are the distinct
(key head, value head) pairs in use and ``G = min(Hq, Hk * Hv)``, unused groups being empty. Group
``G`` holds the heads whose map entry is out of range: kernels give them NaN and read no key or
value.

Every size depends on shapes only and every step is a torch op of static shape, so a map that lives
on the device costs no synchronisation and may change between CUDA-graph replays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call.attention import AttentionCall
from ...head_map import HeadMap


def num_groups(plan: Tensor, num_heads: int) -> int:
    """``G`` of a plan for ``num_heads`` query heads, from its length."""
    return plan.numel() - 3 * num_heads - 2


def build_plan(
    head_map: Tensor, num_k_heads: int, value_head_map: Tensor | None, num_v_heads: int
) -> Tensor:
    """The plan of integer map tensors ``[Hq]``, on their device, without synchronisation."""
    k_head = head_map.long()
    num_heads = k_head.numel()
    valid = (k_head >= 0) & (k_head < num_k_heads)
    if value_head_map is None:
        v_head, groups = k_head, num_k_heads
        group = torch.where(valid, k_head, groups)
        perm = torch.argsort(group, stable=True)
        group = group[perm]
    else:
        v_head, groups = value_head_map.long(), min(num_heads, num_k_heads * num_v_heads)
        valid &= (v_head >= 0) & (v_head < num_v_heads)
        pair = torch.where(valid, k_head * num_v_heads + v_head, num_k_heads * num_v_heads)
        perm = torch.argsort(pair, stable=True)
        pair = pair[perm]
        is_first = torch.ones_like(valid)
        is_first[1:] = pair[1:] != pair[:-1]
        group = torch.where(valid[perm], is_first.cumsum(0) - 1, groups)
    offsets = torch.searchsorted(group, torch.arange(groups + 2, device=group.device))
    k_head, v_head = (torch.where(valid, x, 0)[perm] for x in (k_head, v_head))
    return torch.cat([perm, k_head, v_head, offsets]).to(torch.int32)


def regrouped(plan: Tensor, num_heads: int, num_kv_heads: int, by_value: bool) -> Tensor:
    """The plan sorted by key head alone, or by value head alone: group ``g`` is that KV head.

    Args:
        plan: of ``num_heads`` query heads.
        num_kv_heads: ``Hk``, or ``Hv`` where ``by_value``.
    """
    perm, k_head, v_head = plan[: 3 * num_heads].view(3, num_heads)
    num_valid = plan[3 * num_heads + num_groups(plan, num_heads)]
    valid = torch.arange(num_heads, device=plan.device) < num_valid
    group = torch.where(valid, v_head if by_value else k_head, num_kv_heads)
    order = torch.argsort(group, stable=True)
    bounds = torch.arange(num_kv_heads + 2, device=plan.device)
    offsets = torch.searchsorted(group[order], bounds).to(torch.int32)
    return torch.cat([perm[order], k_head[order], v_head[order], offsets])


def largest_first(plan: Tensor, num_heads: int) -> Tensor:
    """Groups of a plan in descending order of size, int32 ``[G]``."""
    sizes = plan[3 * num_heads : -1].diff()
    return torch.argsort(sizes, descending=True, stable=True).to(torch.int32)


def plan_for(call: AttentionCall) -> Tensor:
    """The plan of a call, built once per device where its maps are HeadMaps."""
    k_map, v_map = call.head_map, call.value_head_map

    def build() -> Tensor:
        return build_plan(
            call.head_map_tensor, call.num_k_heads, call.value_head_map_tensor,
            call.num_v_heads,
        )  # fmt: skip

    if isinstance(k_map, HeadMap) and not isinstance(v_map, Tensor):
        return k_map.cached(("plan", call.device, v_map), build)
    return build()
