"""Search over costs of whole groups: what merging a group really loses, not a sum over pairs.

Up to ``EXHAUSTIVE_HEADS`` heads every group is costed once, and the subset DP proves the optimum
for every number of groups. Beyond, groups are costed on demand, all pairs and then the groups that
their costs make promising. That proves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from ..result import SearchResult, Sizes, canonical_labels
from . import local
from .agglomerate import agglomerate
from .group_descent import descend
from .partitions import balanced_sizes, blocks
from .problem import Problem, check_sizes, size_limits
from .subset_dp import MAX_HEADS, Table

GroupCost = Callable[[tuple[int, ...]], float]
EXHAUSTIVE_HEADS = 12  # 4095 groups


def search_groups(
    cost: GroupCost,
    num_heads: int,
    num_groups: int,
    sizes: Sizes = "free",
    *,
    starts: Iterable[Sequence[int]] = (),
    exhaustive: int = EXHAUSTIVE_HEADS,
    patience: int | None = None,
    pairs: np.ndarray | None = None,
) -> SearchResult:
    """The partition with the least sum of ``cost(group)``; proved for few heads.

    ``search`` takes the cost of a group for the mean of its pairs' dissimilarities. What a merged
    head really loses is known for each group only as a whole: ``low_rank.GroupLosses`` computes it
    from second moments, ``convert.losses.MergeLosses`` measures it.

    Args:
        cost: finite, non-negative cost of a group, its heads ascending. Wrap it in
            ``functools.cache`` to search for several ``num_groups``.
        num_heads: ``H``.
        num_groups, sizes: as for ``search``.
        starts: partitions to descend from if there are too many heads to cost every group.
            Adjacent heads, and the best partition by the costs of pairs, are two more.
        exhaustive: up to how many heads, at most 18, every group within the size limits is costed
            (``2^H - 1`` at most) and the result proved.
        patience: steps that the descent tries without a gain before it ends, and then only from
            the best start; None: all, from every start.
        pairs: ``[H, H]`` estimates of the costs of groups of two heads, which decide the order of
            steps. None: these groups are costed.

    Raises:
        ValueError: num_groups or sizes breaks a rule, a start is no partition into ``num_groups``
            groups, or a cost is not finite or is negative.

    Example::

        losses = GroupLosses(HeadSpace.of(weights, "v", moments))
        search_groups(losses, 8, 3).labels
    """
    started = time.perf_counter()
    sizes = check_sizes(sizes)
    lo, hi = _limits(num_heads, num_groups, sizes, exhaustive)
    if num_heads <= exhaustive:
        table = Table(*_all_costs(cost, num_heads, lo, hi), num_heads, lo, hi, num_groups)
        found = table.found(num_groups)
        return _found(found.labels, found.lower_bound, found.lower_bound, started, sizes)
    checked = partial(_checked, cost)
    # Of two heads, the objective of search is half their distance.
    distances = 2 * (_pair_costs(checked, num_heads) if pairs is None else pairs)
    by_pairs = local.solve(Problem.create(distances, num_groups, sizes)).labels.tolist()
    neighbours = blocks(balanced_sizes(num_heads, num_groups)).tolist()
    best, least, allowed = neighbours, math.inf, []
    for start in (neighbours, by_pairs, *starts):
        labels = list(canonical_labels(start))
        if len(labels) != num_heads or max(labels) + 1 != num_groups:
            raise ValueError(
                f"starts must be partitions of {num_heads} heads into {num_groups} groups, got "
                f"{list(start)}"
            )
        sizes_of = np.bincount(labels)
        if sizes_of.min() < lo or sizes_of.max() > hi:
            continue
        allowed.append(labels)
    if patience is not None:
        allowed = [min(allowed, key=partial(total_cost, checked))]
    for labels in allowed:
        labels, value = descend(checked, distances, labels, lo, hi, patience)
        if value < least:
            best, least = labels, value
    return _found(best, least, 0.0, started, sizes)


def search_groups_curve(
    cost: GroupCost,
    num_heads: int,
    *,
    exhaustive: int = EXHAUSTIVE_HEADS,
    pairs: np.ndarray | None = None,
    fewest: int = 1,
) -> dict[int, SearchResult]:
    """``search_groups`` for every number of groups of any sizes, at once.

    Args:
        cost: as for ``search_groups``.
        num_heads: ``H``.
        exhaustive: up to how many heads, at most 18, all ``2^H - 1`` groups are costed and the
            results proved. Beyond, groups are merged two at a time (:mod:`.agglomerate`), which
            costs all pairs and a few groups per step.
        pairs: as for ``search_groups``.
        fewest: the least number of groups, beyond ``exhaustive`` heads: large groups may be slow
            to cost.
    """
    started = time.perf_counter()
    _limits(num_heads, 1, "free", exhaustive)
    if num_heads > exhaustive:
        checked = partial(_checked, cost)
        known = pairs is None
        pairs = _pair_costs(checked, num_heads) if pairs is None else pairs
        merged = agglomerate(checked, pairs, known=known, fewest=min(fewest, num_heads))
        return {
            G: _found(labels, value, 0.0, started, "free")
            for G, (labels, value) in sorted(merged.items())
        }
    table = Table(*_all_costs(cost, num_heads, 1, num_heads), num_heads, 1, num_heads, num_heads)
    found = ((G, table.found(G)) for G in range(1, num_heads + 1))
    return {
        G: _found(each.labels, each.lower_bound, each.lower_bound, started, "free")
        for G, each in found
    }


def total_cost(cost: GroupCost, labels: Sequence[int]) -> float:
    """The sum of ``cost(group)`` over the groups of a partition."""
    return sum(cost(group) for group in _groups(labels))


def _limits(num_heads: int, num_groups: int, sizes: Sizes, exhaustive: int) -> tuple[int, int]:
    if not 1 <= exhaustive <= MAX_HEADS:
        raise ValueError(f"exhaustive must lie in [1, {MAX_HEADS}] heads, got {exhaustive}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if not 1 <= num_groups <= num_heads:
        raise ValueError(f"num_groups must lie in [1, {num_heads}], got {num_groups}")
    return size_limits(sizes, num_heads, num_groups)


def _all_costs(cost: GroupCost, num_heads: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
    """``[2^(H-1)]`` costs by bit mask of heads 1 to H - 1: without, and with head 0."""
    costs = np.full(1 << num_heads, np.inf)
    for size in range(lo, hi + 1):
        for heads in combinations(range(num_heads), size):
            costs[sum(1 << h for h in heads)] = _checked(cost, heads)
    return costs[0::2], costs[1::2]


def _pair_costs(cost: GroupCost, num_heads: int) -> np.ndarray:
    """``[H, H]``: the cost of each group of two heads, 0 for one."""
    pairs = np.zeros((num_heads, num_heads))
    for i, j in combinations(range(num_heads), 2):
        pairs[i, j] = pairs[j, i] = cost((i, j))
    return pairs


def _checked(cost: GroupCost, heads: tuple[int, ...]) -> float:
    value = cost(heads)
    if not 0 <= value < np.inf:
        raise ValueError(f"cost must be finite and non-negative, got {value} for {heads}")
    return value


def _found(
    labels: Sequence[int], value: float, bound: float, started: float, sizes: Sizes
) -> SearchResult:
    return SearchResult(
        labels=canonical_labels(labels),
        objective=value,
        lower_bound=bound,
        proved=bound == value,
        seconds=time.perf_counter() - started,
        method="group_costs",
        sizes=sizes,
    )


def _groups(labels: Sequence[int]) -> list[tuple[int, ...]]:
    groups: dict[int, list[int]] = {}
    for head, label in enumerate(labels):
        groups.setdefault(label, []).append(head)
    return [tuple(group) for group in groups.values()]
