"""The short way of plain calls on the CPU: a HeadMap, no options, nothing to differentiate.

Checking and describing a call costs more than the attention of one token over a short context. A
plain call goes to the compiled op at once, which checks shapes, types and strides itself; whatever
it refuses is left to the long way, whose errors are the public ones. Values of a cache's lengths
and page table are looked at by one op, ``cache_slots_exist``, in place of a dozen of torch's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..head_map import HeadMap
from ..inputs import LAYOUTS, UNBOUNDED
from ..native import build

if TYPE_CHECKING:
    from ..cache.view import KVView

REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ZeroDivisionError)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: object,
    causal: bool,
    scale: float | None,
    layout: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Out in the caller's layout and, where asked for, the LSE, as the CPU backend gives them; None
    where the call is not a plain one. Arguments are those of
    :func:`gqa_kernels.asym_gqa_attention`, unchecked."""
    if torch.compiler.is_compiling() or not (
        type(q) is type(k) is type(v) is Tensor
        and type(head_map) is HeadMap
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and build.library_path() is not None
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and layout in LAYOUTS
        and not _is_recorded(q, k, v)
    ):
        return None
    bshd = layout == "bshd"
    heads, lse = head_map.num_kv_heads, None
    try:
        with torch._C._AutoDispatchBelowAutograd():
            if bshd:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            # The op without an LSE takes memory that deterministic mode does not fill.
            if return_lse or torch._C._get_deterministic_algorithms():
                if not k.shape[1] == v.shape[1] == heads:
                    return None
                out, lse = torch.ops.gqa_kernels.attention_forward.default(
                    q, k, v, head_map.cpu_tensor, None, None, None, None, None,
                    q.shape[3] ** -0.5 if scale is None else scale,
                    UNBOUNDED, 0 if causal else UNBOUNDED, 0.0, bshd and q.shape[2] > 1, 0.0, None,
                )  # fmt: skip
            else:
                out = torch.ops.gqa_kernels.plain_attention_forward.default(
                    q, k, v, head_map.cpu_tensor, heads, scale, bool(causal),
                    bshd and q.shape[2] > 1,
                )  # fmt: skip
            return out.transpose(1, 2) if bshd else out, lse
    except REFUSALS:
        return None


def slots_exist(view: KVView, new: int | Tensor) -> bool:
    """Whether the compiled op finds a slot for every key of a view and for ``new`` more per
    sequence, a number or offsets ``[B + 1]``. False, too, where it can't look."""
    if torch.compiler.is_compiling() or not view.k.is_cpu or build.library_path() is None:
        return False
    offsets, tokens = (new, 0) if isinstance(new, Tensor) else (None, new)
    try:
        return torch.ops.gqa_kernels.cache_slots_exist.default(
            view.kv_lengths, view.page_table, view.kv_begin, offsets, tokens, view.k.shape[0],
            view.k.shape[2],
        )  # fmt: skip
    except REFUSALS:
        return False


def append(view: KVView, k_new: Tensor, v_new: Tensor) -> bool:
    """Write ``[B, H, S, D]`` tokens into a view whose values are unchecked; False, and nothing
    written, where the call is not a plain one."""
    k = view.k
    if torch.compiler.is_compiling() or not (
        type(k_new) is type(v_new) is type(k) is Tensor
        and k_new.is_cpu
        and v_new.is_cpu
        and k_new.dim() == 4
        and k.shape[1] == view.v.shape[1]
        and build.library_path() is not None
        and not _is_recorded(k_new, v_new, k)
        and slots_exist(view, k_new.shape[2])
    ):
        return False
    try:
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.gqa_kernels.cache_append.default(
                None, k_new, v_new, k, view.v, view.kv_lengths, view.page_table, view.kv_begin,
                None, view.k_scale, view.v_scale, view.k_zero, view.v_zero, None, None, False,
            )  # fmt: skip
    except REFUSALS:
        return False
    return True


def attend_cache(
    q: Tensor,
    view: KVView,
    head_map: object,
    causal: bool,
    scale: float | None,
    lse_wanted: bool,
) -> tuple[Tensor, Tensor] | None:
    """Out and LSE of queries ``[B, Hq, S, D]`` over a view whose values were checked, as the CPU
    backend gives them; None where the call is not a plain one."""
    k, v = view.k, view.v
    if torch.compiler.is_compiling() or not (
        type(q) is type(k) is Tensor
        and type(head_map) is HeadMap
        and q.is_cpu
        and k.is_cpu
        and build.library_path() is not None
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and not _is_recorded(q, k, v)
    ):
        return None
    try:
        if not k.shape[1] == v.shape[1] == head_map.num_kv_heads:
            return None
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.gqa_kernels.cache_attention_forward.default(
                q, k, v, head_map.cpu_tensor, None, None, None, None, view.kv_lengths,
                view.page_table, view.kv_begin, None, q.shape[2], view.k_scale, view.v_scale,
                view.k_zero, view.v_zero, q.shape[3] ** -0.5 if scale is None else scale,
                UNBOUNDED, 0 if causal else UNBOUNDED, 0.0, False, lse_wanted,
            )  # fmt: skip
    except REFUSALS:
        return None


def _is_recorded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd, autocast or torch.func have a part in the call."""
    return (
        (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or torch.is_autocast_enabled("cpu")
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
