"""What every search minimises, and the checks on the matrix it is computed from.

A partition of the heads costs ``sum over groups S of (1/|S|) * sum_{i<j in S} D_ij``. With ``D_ij``
the squared distance of two heads this is the squared error of replacing each head by its group's
mean; a group of one head costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Two objectives count as equal when they differ by at most this, relative to
# max(objective, largest entry of D).
TOLERANCE = 1e-9

# What rounding may do to a computed D, relative to its largest entry: asymmetry, a diagonal that is
# not quite zero, a distance just below zero. Anything larger is an error.
_ROUNDING = 1e-5


def as_distances(D: ArrayLike) -> NDArray[np.float64]:
    """Check a dissimilarity matrix and return it as a read-only fp64 copy.

    Args:
        D: ``[H, H]`` array, or an object holding one as ``.array``.

    Returns:
        ``[H, H]`` fp64, exactly symmetric, non-negative, with a zero diagonal.

    Raises:
        ValueError: D is not square, symmetric, non-negative and finite with a zero diagonal.
    """
    D = np.asarray(getattr(D, "array", D), dtype=np.float64)
    if D.ndim != 2 or D.shape[0] != D.shape[1] or D.size == 0:
        raise ValueError(f"D must be a square matrix [H, H] with H >= 1, got shape {D.shape}")
    if not np.isfinite(D).all():
        i, j = np.argwhere(~np.isfinite(D))[0]
        raise ValueError(f"D must be finite, got {D[i, j]} at ({i}, {j})")
    slack = _ROUNDING * np.abs(D).max()
    i, j = np.unravel_index(np.argmin(D), D.shape)
    if D[i, j] < -slack:
        raise ValueError(f"D must be non-negative, got {D[i, j]} at ({i}, {j})")
    i = int(np.argmax(np.abs(np.diagonal(D))))
    if abs(D[i, i]) > slack:
        raise ValueError(f"D must have a zero diagonal, got {D[i, i]} at ({i}, {i})")
    i, j = np.unravel_index(np.argmax(np.abs(D - D.T)), D.shape)
    if abs(D[i, j] - D[j, i]) > slack:
        raise ValueError(
            f"D must be symmetric, got {D[i, j]} at ({i}, {j}) and {D[j, i]} at ({j}, {i})"
        )
    D = np.maximum((D + D.T) / 2, 0.0)
    np.fill_diagonal(D, 0.0)
    D.flags.writeable = False
    return D


def group_cost(D: NDArray[np.float64], members: Sequence[int]) -> float:
    """``(1/|S|) * sum_{i<j in S} D_ij`` of one non-empty group ``S``."""
    members = np.asarray(members, dtype=np.intp)
    return float(D[np.ix_(members, members)].sum() / (2 * len(members)))


def objective(D: NDArray[np.float64], labels: Sequence[int]) -> float:
    """Cost of a partition given as ``H`` group labels; empty groups cost nothing.

    Examples:
        >>> import numpy as np
        >>> from gqa_kernels.grouping import objective
        >>> D = np.array([[0, 1, 4], [1, 0, 4], [4, 4, 0]])
        >>> objective(D, [0, 0, 1])
        0.5
    """
    labels = np.asarray(labels, dtype=np.intp)
    return sum(group_cost(D, np.flatnonzero(labels == g)) for g in np.unique(labels))
