"""Generalised Procrustes: turn the heads of a group onto their mean.

"Align before merge" (arXiv 2412.20677): heads that look unrelated often span the same features in
another basis. Turning a head and undoing it in q or o changes nothing; the mean of turned heads
loses far less than the mean of the heads as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .space import HeadSpace

_MAX_ROUNDS = 100
_TOLERANCE = 1e-5  # relative gain of a round at which to stop


def rotations(space: HeadSpace, heads: list[int], shares: Tensor) -> Tensor:
    """``[n, D, D]`` allowed rotations that bring ``n`` KV heads together.

    Each head in turn is turned onto the weighted sum of the others until nothing is gained; every
    turn raises ``sum_{i<j} s_i s_j E[R_i k_i . R_j k_j]``, so it can't cycle. The result is a local
    optimum; it starts from all heads turned onto the one that overlaps most with the others.

    Args:
        heads: KV heads.
        shares: ``[n]`` weight of each in the mean.
    """
    cross = space.cross[heads][:, heads]  # [n, n, D, D]
    overlaps = space.symmetry.overlap(cross) * shares[:, None] * shares
    centre = int(overlaps.sum(0).argmax())
    R = space.symmetry.nearest(cross[centre])
    R[centre] = torch.eye(R.shape[1], dtype=R.dtype)
    last = -torch.inf
    for _ in range(_MAX_ROUNDS if len(heads) > 2 else 0):
        gain = 0.0
        for i in range(len(heads)):
            # sum over the others j of s_j R_j C_ji: what head i is turned onto
            towards = torch.einsum("j,jab,jbc->ac", shares, R, cross[:, i])
            towards = towards - shares[i] * R[i] @ cross[i, i]
            R[i] = space.symmetry.nearest(towards)
            gain += float(shares[i] * (R[i] * towards).sum())
        if gain - last <= _TOLERANCE * abs(gain):
            break
        last = gain
    return R
