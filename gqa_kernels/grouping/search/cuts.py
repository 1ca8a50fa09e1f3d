"""Subset-row cuts: at most one group of a partition holds two or more of any three heads.

(Jepsen, Petersen, Spoorendonk and Pisinger, "Subset-row inequalities", Operations Research 2008.)
They close most of what the LP relaxation of set partitioning leaves open, so that far fewer columns
survive reduced-cost fixing.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy.sparse import csr_array

from .columns import Columns

_MIN_VIOLATION = 1e-3


def cut_rows(columns: Columns, triples: np.ndarray) -> csr_array:
    """``[C, n]``: 1 if the column holds two or three heads of the triple ``triples [C, 3]``."""
    if not len(triples):
        return csr_array((0, len(columns)))
    picks = csr_array(
        (np.ones(triples.size), triples.ravel(), np.arange(0, triples.size + 1, 3)),
        shape=(len(triples), columns.num_heads),
    )
    shared = csr_array(picks @ columns.incidence())
    shared.data = (shared.data >= 2).astype(np.float64)
    shared.eliminate_zeros()
    return shared


def violated(columns: Columns, weights: np.ndarray, limit: int) -> np.ndarray:
    """``[C, 3]``: the most violated triples of an LP solution, at most ``limit``."""
    used = weights > 1e-6
    inside = columns.take(np.flatnonzero(used)).incidence().toarray().astype(np.int8)  # [H, F]
    triples = np.array(list(combinations(range(columns.num_heads), 3)), dtype=np.intp)
    triples = triples.reshape(-1, 3)
    excess = np.full(len(triples), -1.0)
    for row, weight in zip(inside.T, weights[used], strict=True):
        excess += weight * (row[triples].sum(1) >= 2)
    order = np.argsort(-excess, kind="stable")[:limit]
    return triples[order[excess[order] > _MIN_VIOLATION]]
