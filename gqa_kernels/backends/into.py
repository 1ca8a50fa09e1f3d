"""Attention whose results go to memory of the caller's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.tensors import Layout, check_last_stride
from ..call.attention import AttentionCall
from ..call.checks import heads_first
from ..native.arguments import check_tensors
from .base import Backend


def attend_into(
    call: AttentionCall, backend: Backend, out: Tensor | None, lse: Tensor | None,
    return_lse: bool, layout: Layout = "bhsd",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """What a public function returns of a call, in its ``out`` and ``lse``; what is None is new.

    Raises:
        ValueError, TypeError: the message names the argument, the rule and the value.
    """
    packed = call.q_offsets is not None
    rows = call.q.shape[:3]
    if lse is not None and not return_lse:
        raise ValueError("lse must be None without return_lse=True, got a tensor")
    if call.requires_grad:
        raise ValueError(
            "out and lse must be None where an input requires grad: no gradient flows through "
            "memory of the caller's"
        )
    if out is None:
        out = call.q.new_empty(_in_layout((*rows, call.value_head_dim), layout, packed))
    to_out = heads_first("out", out, layout, packed)
    _check("out", to_out, (*rows, call.value_head_dim), call.dtype, call)
    check_last_stride("out", to_out)
    to_lse = None
    if return_lse:
        dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
        if lse is None:
            lse = call.q.new_empty(rows[1:] if packed else rows, dtype=dtype)
        check_tensors(lse=lse)
        to_lse = lse[None] if packed else lse
        _check("lse", to_lse, tuple(rows), dtype, call)
        if not lse.is_contiguous():
            raise ValueError(f"lse must be contiguous, got strides {lse.stride()}")
    call.lse_wanted = return_lse
    with torch.no_grad():
        backend.attend_into(call, to_out, to_lse)
    return (out, lse) if return_lse and lse is not None else out


def _in_layout(shape: tuple[int, ...], layout: Layout, packed: bool) -> tuple[int, ...]:
    """A shape ``[B, H, S, D]`` as the caller has it."""
    batch, heads, tokens, dim = shape
    if packed:
        return tokens, heads, dim
    return (batch, tokens, heads, dim) if layout == "bshd" else shape


def _check(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, call: AttentionCall
) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}.dtype must be {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} as "
            f"[{', '.join(('B', 'Hq', 'Sq', 'Dv')[: len(shape)])}], got {tuple(x.shape)}"
        )
    if x.device != call.device:
        raise ValueError(f"{name}.device must equal q.device ({call.device}), got {x.device}")
    if x.requires_grad:
        raise ValueError(f"{name}.requires_grad must be False, got True")
