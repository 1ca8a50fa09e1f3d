"""Causality per packed sequence, as ranges of visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.arguments import check_tensors
from .checks import check_longest, check_offsets, first_rows


def causal_ranges(
    causal: Tensor, q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    key_ranges: Tensor | None,
) -> Tensor:  # fmt: skip
    """The key ranges of a packed call whose sequences are causal if ``causal [B]`` is True, within
    ``key_ranges`` if there are any. Nothing is read on the host.

    ``max_seqlen_q`` may be any bound: no sequence has more rows than ``q`` has."""
    check_tensors(causal=causal, q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    batch = max(cu_seqlens_k.numel() - 1, 0)
    if causal.dtype != torch.bool or causal.shape != (batch,):
        raise ValueError(
            f"causal must be a bool, or a bool tensor of shape ({batch},), "
            f"got {causal.dtype} {tuple(causal.shape)}"
        )
    if causal.device != cu_seqlens_k.device:
        raise ValueError(
            f"causal.device must equal cu_seqlens_k.device ({cu_seqlens_k.device}), "
            f"got {causal.device}"
        )
    check_offsets("cu_seqlens_q", cu_seqlens_q, batch, q.device)
    check_offsets("cu_seqlens_k", cu_seqlens_k, batch, q.device)
    given = check_longest("max_seqlen_q", max_seqlen_q)
    most = min(given, q.shape[0] if q.dim() else 0)
    queries = torch.arange(most, device=causal.device)
    first_position = cu_seqlens_k.diff() - cu_seqlens_q.diff()
    last = first_position[:, None] + queries + 1
    end = torch.where(causal[:, None], last, torch.iinfo(torch.int32).max)[:, None]  # [B, 1, Sq]
    if key_ranges is None:
        return torch.stack([torch.zeros_like(end), end], -1)
    check_tensors(key_ranges=key_ranges)
    if key_ranges.dim() != 4 or key_ranges.shape[0] != batch or key_ranges.shape[-1] != 2:
        return key_ranges  # the check of key_ranges says what it must be
    begin, own_end = first_rows(key_ranges, -2, given, most).unbind(-1)
    if own_end.shape[2] != end.shape[2]:
        return key_ranges
    return torch.stack([begin, torch.minimum(own_end, end.to(own_end.dtype))], -1)
