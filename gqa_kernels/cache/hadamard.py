"""The Hadamard rotation of keys and queries: why 4 bits are enough for keys.

A few columns of a model's keys are much larger than the others, and one scale per row then leaves
few steps for those. A rotation spreads them over all columns, and changes no score: with an
orthogonal matrix ``H``, ``(q H) . (k H) = q . k`` (QuaRot, arXiv 2404.00456). Caches with
``hadamard=True`` store ``k H``, and attention over them rotates the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_size(head_dim: int) -> int:
    """The largest power of 2 that divides the head dim: columns are rotated in blocks of it."""
    return head_dim & -head_dim


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError for a head dim without blocks to rotate."""
    if block_size(head_dim) < 2:
        raise ValueError(f"hadamard must be False for an odd head dim, got {head_dim}")


def rotate_by_hadamard(x: Tensor) -> Tensor:
    """``x H``, computed in fp32 (fp64 for fp64), in x's dtype; applied twice it is ``x``.

    Args:
        x: ``[..., D]``, D even. ``H`` is block-diagonal: Hadamard matrices of :func:`block_size`.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    size = block_size(x.shape[-1])
    blocks = wide.unflatten(-1, (-1, size))
    step = 1
    while step < size:  # sums and differences of pairs, then of pairs of pairs, ...
        pairs = blocks.unflatten(-1, (-1, 2, step))
        a, b = pairs.unbind(-2)
        blocks = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return (blocks * size**-0.5).flatten(-2).to(x.dtype)
