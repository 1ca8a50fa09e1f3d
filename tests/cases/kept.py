"""Random keys to keep, and what a cache must then hold."""

from __future__ import annotations

import torch
from torch import Tensor


def random_kept(
    lengths: list[int], heads: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending positions ``[B, H, n]`` and their numbers ``[B, H]``, a different part of the keys
    of each (sequence, head), 0 and all of them included; garbage beyond the number."""
    counts = torch.empty(len(lengths), heads, dtype=torch.int64)
    rows = []
    for b, length in enumerate(lengths):
        for h in range(heads):
            shares = (0.0, 1.0, float(torch.rand((), generator=generator)))
            count = round(shares[int(torch.randint(0, 3, (), generator=generator))] * length)
            counts[b, h] = count
            rows.append(torch.randperm(length, generator=generator)[:count].sort().values)
    most = max(len(row) for row in rows) + 2
    kept = torch.full((len(rows), most), 123456)
    for row, positions in zip(kept, rows, strict=True):
        row[: len(positions)] = positions
    return kept.view(len(lengths), heads, most), counts
