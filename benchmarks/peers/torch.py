"""What people run today instead: torch's attention on expanded, permuted, padded or cut-up inputs.

Each peer gets its best input, prepared outside the timing: heads in
another order, zero heads added, a cache stored expanded. What it must do per call is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..ops.attention import Problem
from .base import UNEVEN, Contestant, Prepared

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
SDPA_STORAGE = {
    "expand+sdpa": "K and V expanded to all query heads in every call, then SDPA",
    "expanded-sdpa": "SDPA on a cache kept expanded (Hq / Hkv times the memory), not timed",
    "gqa-sdpa": "SDPA with enable_gqa (CPUs: torch's flash kernel); equal, contiguous groups only",
}


class SdpaPeer(Contestant):
    """SDPA on K and V expanded in each call, expanded before timing, or as they are (even maps)."""

    def __init__(self, storage: str, backend: str | None = None):
        self.storage, self.backend = storage, backend
        self.name = f"{storage}:{backend}" if backend else storage
        self.summary = SDPA_STORAGE[storage] + (f" ({backend} backend)" if backend else "")

    def unavailable_reason(self, device: torch.device) -> str | None:
        if self.backend and device.type != "cuda":
            return "SDPA's backends are forced on GPUs only"
        return None

    def unsupported_reason(self, problem: Problem) -> str | None:
        if self.storage == "gqa-sdpa" and not problem.head_map.is_uniform:
            return UNEVEN
        return None

    def prepare(self, problem: Problem) -> Prepared:
        options = sdpa_options(problem)
        index = problem.head_map.tensor(problem.device).long()
        inputs = problem.expanded if self.storage == "expanded-sdpa" else problem.copies
        if self.storage == "gqa-sdpa":
            options["enable_gqa"] = True

        def run(copy: int) -> Tensor:
            q, k, v = inputs[copy]
            if self.storage == "expand+sdpa":
                k, v = k.index_select(1, index), v.index_select(1, index)
            return scaled_dot_product_attention(q, k, v, **options)

        return Prepared(_forced(run, SDPA_BACKENDS[self.backend]) if self.backend else run)


class FlexPeer(Contestant):
    name = "flex"
    summary = "FlexAttention, compiled for the shape; equal, contiguous groups only"

    def unsupported_reason(self, problem: Problem) -> str | None:
        return None if problem.head_map.is_uniform else UNEVEN

    def prepare(self, problem: Problem) -> Prepared:
        case, flex, mask = problem.case, _compiled_flex(), None
        if case.causal or case.window is not None:
            from torch.nn.attention.flex_attention import create_block_mask

            offset, window = case.kv_len - case.q_len, case.window

            def visible(b, h, i, j):
                seen = j <= i + offset
                return seen if window is None else seen & (j >= i + offset - window)

            mask = create_block_mask(
                visible, None, None, case.q_len, case.kv_len, device=problem.device
            )

        bias = problem.bias

        def with_bias(score, b, h, i, j):
            return score + bias[0, h, i, j]

        score_mod = with_bias if bias is not None else None

        def run(copy: int) -> Tensor:
            q, k, v = problem.copies[copy]
            return flex(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)

        return Prepared(run)


class PerSizePeer(Contestant):
    name = "sdpa-per-size"
    summary = "one SDPA call with enable_gqa per distinct group size; heads stored in that order"

    def prepare(self, problem: Problem) -> Prepared:
        groups = problem.head_map.groups
        sizes = sorted({len(group) for group in groups} - {0})
        kv_heads = [[g for g, group in enumerate(groups) if len(group) == n] for n in sizes]
        heads = [[h for g in chosen for h in groups[g]] for chosen in kv_heads]
        inputs = [
            [(q[:, hs], k[:, gs], v[:, gs]) for hs, gs in zip(heads, kv_heads, strict=True)]
            for q, k, v in problem.copies
        ]
        options = [dict(sdpa_options(problem)) for _ in sizes]
        if problem.bias is not None:
            for chosen, hs in zip(options, heads, strict=True):
                chosen["attn_mask"] = chosen["attn_mask"][:, hs]

        def run(copy: int) -> list[Tensor]:
            return [
                scaled_dot_product_attention(q, k, v, enable_gqa=True, **chosen)
                for (q, k, v), chosen in zip(inputs[copy], options, strict=True)
            ]

        order = torch.tensor([h for hs in heads for h in hs], device=problem.device)
        return Prepared(run, lambda outs: torch.cat(outs, 1)[:, order.argsort()])


class PaddedPeer(Contestant):
    name = "sdpa-padded"
    summary = "every group padded with zero query heads to the largest, then SDPA with enable_gqa"

    def prepare(self, problem: Problem) -> Prepared:
        slots, width = padded_slots(problem)
        inputs = [(pad_heads(q, slots, width), k, v) for q, k, v in problem.copies]
        options = sdpa_options(problem)
        if problem.bias is not None:
            options["attn_mask"] = pad_heads(options["attn_mask"], slots, width)

        def run(copy: int) -> Tensor:
            q, k, v = inputs[copy]
            return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

        return Prepared(run, lambda out: out[:, slots])


class RowsPeer(Contestant):
    name = "sdpa-rows"
    summary = (
        "each (sequence, KV head) as a sequence of one head whose queries are the group's heads, "
        "padded to the largest group; decode only"
    )

    def unsupported_reason(self, problem: Problem) -> str | None:
        return rows_unsupported(problem)

    def prepare(self, problem: Problem) -> Prepared:
        slots, width = padded_slots(problem)
        batch, _, _, dim = problem.copies[0][0].shape
        kv_heads = problem.head_map.num_kv_heads
        inputs = [
            (
                pad_heads(q, slots, width).view(batch * kv_heads, 1, -1, dim),
                k.view(batch * kv_heads, 1, -1, dim),
                v.view(batch * kv_heads, 1, -1, dim),
            )
            for q, k, v in problem.copies
        ]

        def run(copy: int) -> Tensor:
            return scaled_dot_product_attention(*inputs[copy])

        return Prepared(run, lambda out: out.reshape(batch, width, 1, dim)[:, slots])


def torch_peers() -> list[Contestant]:
    """Peers that torch brings."""
    found: list[Contestant] = [SdpaPeer(storage) for storage in SDPA_STORAGE]
    found += [FlexPeer(), RowsPeer(), PaddedPeer(), PerSizePeer()]
    return found + [SdpaPeer(storage, name) for storage in SDPA_STORAGE for name in SDPA_BACKENDS]


def sdpa_options(problem: Problem) -> dict:
    """SDPA's mask arguments for a case. Its own causal mask is aligned to the first key."""
    case, bias = problem.case, problem.bias
    if not case.causal and case.window is None:
        return {} if bias is None else {"attn_mask": bias}
    if case.q_len == case.kv_len and case.window is None and bias is None:
        return {"is_causal": True}
    i = torch.arange(case.q_len, device=problem.device)[:, None] + case.kv_len - case.q_len
    j = torch.arange(case.kv_len, device=problem.device)
    mask = j <= i
    if case.window is not None:
        mask &= j >= i - case.window
    return {"attn_mask": mask if bias is None else bias.masked_fill(~mask, -torch.inf)}


def rows_unsupported(problem: Problem) -> str | None:
    """Why heads can't be taken for query rows: a mask would treat them as positions."""
    case = problem.case
    if case.q_len > 1 or case.window is not None or case.relative_bias:
        return "decode without a window or a bias only"
    return None


def padded_slots(problem: Problem) -> tuple[Tensor, int]:
    """Where each query head goes when groups are padded to the largest, and the slots in all."""
    groups = problem.head_map.groups
    largest = max(map(len, groups))
    slots = torch.empty(problem.head_map.num_heads, dtype=torch.long)
    for g, group in enumerate(groups):
        for i, h in enumerate(group):
            slots[h] = g * largest + i
    return slots.to(problem.device), len(groups) * largest


def pad_heads(q: Tensor, slots: Tensor, width: int) -> Tensor:
    """q ``[B, Hq, Sq, D]`` with its heads at their slots among zero heads."""
    padded = q.new_zeros(q.shape[0], width, *q.shape[2:])
    padded[:, slots] = q
    return padded


def _compiled_flex() -> Callable:
    """Compiled again for each case. After eight shapes of one function Dynamo would continue in
    eager mode, in which FlexAttention materialises all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _forced(run: Callable[[int], Tensor], backend: SDPBackend) -> Callable[[int], Tensor]:
    def forced(copy: int) -> Tensor:
        with sdpa_kernel(backend):
            return run(copy)

    return forced
