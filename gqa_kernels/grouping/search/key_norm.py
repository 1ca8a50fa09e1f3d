"""Group sizes from key norms, as KDGQA and DGQA assign query heads to KV heads (arXiv 2408.08454).

There the sizes change while the model runs. Here they are computed once, from calibration norms
(``grouping.key_norms``), and the heads are then assigned to groups of those sizes so that the
objective is low.
"""

from __future__ import annotations

import numpy as np

from .descent import descend, objectives
from .partitions import blocks
from .problem import Problem
from .registry import Found

RULES = ("kdgqa", "dgqa")


def solve(problem: Problem, norms, rule: str = "kdgqa", starts: int = 64) -> Found:
    """Sizes from ``norms``, then the best assignment that swaps find from ``starts`` starts.

    Args:
        norms: ``[G]`` key norm of each pooled KV head.
        rule: see ``key_norm_sizes``.
    """
    if len(norms) != problem.num_groups:
        raise ValueError(f"norms must have {problem.num_groups} entries, got {len(norms)}")
    if starts < 1:
        raise ValueError(f"starts must be >= 1, got {starts}")
    sizes = key_norm_sizes(norms, problem.num_heads, rule, problem.lo, problem.hi)
    rng = problem.rng()
    labels = np.stack([rng.permutation(blocks(np.array(sizes))) for _ in range(starts)])
    labels = descend(problem, labels, moves=False)
    values = objectives(problem.distances, labels)
    return Found(labels[values.argmin()])


def key_norm_sizes(
    norms, num_heads: int, rule: str = "kdgqa", lo: int = 0, hi: int | None = None
) -> list[int]:
    """Query heads of each KV head, by largest remainders.

    Args:
        norms: ``[G]`` non-negative key norms.
        num_heads: query heads to assign.
        rule: ``"kdgqa"`` assigns in proportion to the norm minus the smallest norm (so the KV head
            of smallest norm gets ``lo``), ``"dgqa"`` in proportion to the norm itself.
        lo, hi: smallest and largest size.
    """
    norms = np.asarray(norms, dtype=np.float64)
    if norms.ndim != 1 or not len(norms) or not np.isfinite(norms).all() or norms.min() < 0:
        raise ValueError(f"norms must be finite, non-negative numbers [G], got {norms}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    hi = num_heads if hi is None else hi
    if not lo * len(norms) <= num_heads <= hi * len(norms):
        raise ValueError(
            f"sizes must let {len(norms)} groups hold {num_heads} heads, got lo = {lo}, hi = {hi}"
        )
    shares = norms - norms.min() if rule == "kdgqa" else norms
    if shares.sum() == 0:
        shares = np.ones(len(norms))
    shares = shares / shares.sum() * num_heads
    sizes = np.clip(np.floor(shares), lo, hi).astype(int)
    while sizes.sum() != num_heads:
        step = 1 if sizes.sum() < num_heads else -1
        movable = np.flatnonzero(sizes < hi if step > 0 else sizes > lo)
        # the largest remainder gains, the smallest loses; of equals, the first or the largest
        order = np.lexsort((-sizes[movable] * (step < 0), -step * (shares - sizes)[movable]))
        sizes[movable[order[0]]] += step
    return sizes.tolist()
