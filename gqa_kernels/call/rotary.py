"""Rotary embedding: what it computes, and the positions of new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.arguments import check_tensors


def rotate(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of the first ``R`` columns, in fp32, rounded to
    x's dtype.

    Args:
        x: ``[..., H, D]``.
        position: ``[..., H]`` or ``[..., 1]``; beyond the table its last row is taken.
        cos, sin: ``[max_position, R / 2]``.
    """
    position = position.clamp(0, cos.shape[0] - 1)
    cos, sin = cos[position].float(), sin[position].float()
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def check_positions(positions: Tensor, k_new: Tensor, packed: bool) -> None:
    """Positions of new tokens must be integers, one per token: ``[B, S]``, or ``[total]`` for
    packed tokens.

    Args:
        k_new: ``[B, Hk, S, D]``; packed ``[1, Hk, total, D]``.
    """
    check_tensors(rotary_positions=positions)
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rotary_positions.dtype must be int32 or int64, got {positions.dtype}")
    batch, tokens = k_new.shape[0], k_new.shape[2]
    shape = (tokens,) if packed else (batch, tokens)
    if positions.shape != shape or positions.device != k_new.device:
        raise ValueError(
            f"rotary_positions must have shape {shape} on {k_new.device}, one position per new "
            f"token, got {tuple(positions.shape)} on {positions.device}"
        )


def positions_from(first: Tensor, tokens: int, offsets: Tensor | None) -> Tensor:
    """Positions of consecutive new tokens.

    Args:
        first: ``[B]``, position of each sequence's first new token.
        tokens: new tokens of a sequence; with ``offsets`` of all sequences.
        offsets: ``[B + 1]`` for packed tokens, or None.

    Returns:
        int64 ``[B, S]``, or packed ``[total]``. Of packed tokens of no sequence any position.
    """
    token = torch.arange(tokens, device=first.device)
    if offsets is None:
        return first.long()[:, None] + token
    sequence = torch.searchsorted(offsets.long(), token, right=True) - 1
    sequence = sequence.clamp(0, max(first.shape[0] - 1, 0))
    return first.long()[sequence] + token - offsets.long()[sequence]
