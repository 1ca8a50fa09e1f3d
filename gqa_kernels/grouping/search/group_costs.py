"""Exact search for costs of a group that are not a sum over pairs of heads."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ..result import SearchResult, Sizes, canonical_labels
from .problem import check_sizes, size_limits
from .subset_dp import MAX_HEADS, Table


def search_groups(
    cost: Callable[[tuple[int, ...]], float],
    num_heads: int,
    num_groups: int,
    sizes: Sizes = "free",
) -> SearchResult:
    """The partition with the least sum of ``cost(group)``, proved, for few heads.

    ``search`` takes the cost of a group for the mean of its pairs' dissimilarities; what a merged
    head really loses (``low_rank.discarded_energy``) is known for each group only as a whole.

    Args:
        cost: finite, non-negative cost of a group, its heads ascending; called for every group
            within the size limits, up to ``2^H - 1`` of them. Wrap it in ``functools.cache`` to
            search for several ``num_groups``.
        num_heads: ``H``, 18 at most.
        num_groups, sizes: as for ``search``.

    Raises:
        ValueError: num_groups or sizes breaks a rule, there are too many heads, or a cost is not
            finite or is negative.
    """
    started = time.perf_counter()
    if not 1 <= num_heads <= MAX_HEADS:
        raise ValueError(f"num_heads must lie in [1, {MAX_HEADS}], got {num_heads}")
    if not 1 <= num_groups <= num_heads:
        raise ValueError(f"num_groups must lie in [1, {num_heads}], got {num_groups}")
    sizes = check_sizes(sizes)
    lo, hi = size_limits(sizes, num_heads, num_groups)
    costs = np.full(1 << num_heads, np.inf)  # by bit mask of the group's heads
    for mask in range(1, 1 << num_heads):
        if lo <= mask.bit_count() <= hi:
            heads = tuple(h for h in range(num_heads) if mask >> h & 1)
            costs[mask] = value = cost(heads)
            if not 0 <= value < np.inf:
                raise ValueError(f"cost must be finite and non-negative, got {value} for {heads}")
    table = Table(costs[0::2], costs[1::2], num_heads, lo, hi, num_groups)
    found = table.found(num_groups)
    return SearchResult(
        labels=canonical_labels(found.labels),
        objective=found.lower_bound,
        lower_bound=found.lower_bound,
        proved=True,
        seconds=time.perf_counter() - started,
        method="group_costs",
        sizes=sizes,
    )
