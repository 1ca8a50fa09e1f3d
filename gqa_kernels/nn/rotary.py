"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split order of GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """``x`` with channel pairs ``(i, i + D / 2)`` rotated by ``positions * base ** (-2 i / D)``.

    Args:
        x: ``[B, S, H, D]``, D even.
        positions: ``[S]`` or ``[B, S]``.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (positions.to(torch.float32)[..., None] * frequencies)[..., None, :]
    cos, sin = angles.cos(), angles.sin()
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
