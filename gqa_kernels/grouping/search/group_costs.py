"""Search over costs of whole groups: what merging a group really loses, not a sum over pairs.

Up to ``EXHAUSTIVE_HEADS`` heads every group is costed once, and the subset DP proves the optimum
for every number of groups. Beyond, groups are costed on demand: descent from given partitions, by
single moves and swaps, proves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np

from ..result import SearchResult, Sizes, canonical_labels
from .partitions import balanced_sizes, blocks
from .problem import check_sizes, size_limits
from .subset_dp import MAX_HEADS, Table

GroupCost = Callable[[tuple[int, ...]], float]
EXHAUSTIVE_HEADS = 12  # 4095 groups
_MIN_GAIN = 1e-9  # of a step, relative to the cost


def search_groups(
    cost: GroupCost,
    num_heads: int,
    num_groups: int,
    sizes: Sizes = "free",
    *,
    starts: Iterable[Sequence[int]] = (),
    exhaustive: int = EXHAUSTIVE_HEADS,
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
            Adjacent heads are one more.
        exhaustive: up to how many heads, at most 18, every group within the size limits is costed
            (``2^H - 1`` at most) and the result proved.

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
        return _proved(found.labels, found.lower_bound, started, sizes)
    neighbours = blocks(balanced_sizes(num_heads, num_groups)).tolist()
    best, least = neighbours, math.inf
    for start in (neighbours, *starts):
        labels = list(canonical_labels(start))
        if len(labels) != num_heads or max(labels) + 1 != num_groups:
            raise ValueError(
                f"starts must be partitions of {num_heads} heads into {num_groups} groups, got "
                f"{list(start)}"
            )
        sizes_of = np.bincount(labels)
        if sizes_of.min() < lo or sizes_of.max() > hi:
            continue
        labels, value = _descend(cost, labels, lo, hi)
        if value < least:
            best, least = labels, value
    return SearchResult(
        labels=canonical_labels(best),
        objective=least,
        lower_bound=0.0,
        proved=False,
        seconds=time.perf_counter() - started,
        method="group_costs",
        sizes=sizes,
    )


def search_groups_curve(cost: GroupCost, num_heads: int) -> dict[int, SearchResult]:
    """``search_groups`` for every number of groups of any sizes, all proved, from one table.

    Args:
        cost: as for ``search_groups``; called for all ``2^H - 1`` groups.
        num_heads: ``H``, 18 at most.
    """
    started = time.perf_counter()
    _limits(num_heads, 1, "free", num_heads)
    table = Table(*_all_costs(cost, num_heads, 1, num_heads), num_heads, 1, num_heads, num_heads)
    found = ((G, table.found(G)) for G in range(1, num_heads + 1))
    return {G: _proved(each.labels, each.lower_bound, started, "free") for G, each in found}


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


def _checked(cost: GroupCost, heads: tuple[int, ...]) -> float:
    value = cost(heads)
    if not 0 <= value < np.inf:
        raise ValueError(f"cost must be finite and non-negative, got {value} for {heads}")
    return value


def _proved(labels: np.ndarray, value: float, started: float, sizes: Sizes) -> SearchResult:
    return SearchResult(
        labels=canonical_labels(labels),
        objective=value,
        lower_bound=value,
        proved=True,
        seconds=time.perf_counter() - started,
        method="group_costs",
        sizes=sizes,
    )


def _groups(labels: Sequence[int]) -> list[tuple[int, ...]]:
    groups: dict[int, list[int]] = {}
    for head, label in enumerate(labels):
        groups.setdefault(label, []).append(head)
    return [tuple(group) for group in groups.values()]


def _descend(cost: GroupCost, labels: list[int], lo: int, hi: int) -> tuple[list[int], float]:
    """Moves and swaps, each taken as soon as it gains, until none does; and the cost."""
    labels = list(labels)
    groups = {g: [h for h, label in enumerate(labels) if label == g] for g in set(labels)}
    costs = {g: _checked(cost, tuple(heads)) for g, heads in groups.items()}
    gained = True
    while gained:
        gained = False
        for first, second, a, b in _steps(groups, lo, hi):
            # An earlier step may have moved a head of this one.
            if any(h is not None and labels[h] != g for h, g in ((a, first), (b, second))):
                continue
            new = {
                first: sorted({*groups[first], b} - {a, None}),
                second: sorted({*groups[second], a} - {b, None}),
            }
            if not all(lo <= len(heads) <= hi for heads in new.values()):
                continue
            before = costs[first] + costs[second]
            after = {g: _checked(cost, tuple(heads)) for g, heads in new.items()}
            if sum(after.values()) < before * (1 - _MIN_GAIN):
                groups.update(new)
                costs.update(after)
                for g, heads in new.items():
                    for h in heads:
                        labels[h] = g
                gained = True
    return labels, sum(costs.values())


def _steps(
    groups: dict[int, list[int]], lo: int, hi: int
) -> Iterator[tuple[int, int, int | None, int | None]]:
    """``(group, other, head that leaves group, head that leaves other)`` of moves and swaps."""
    current = {g: tuple(heads) for g, heads in groups.items()}
    for first, second in combinations(current, 2):
        if lo < hi:
            yield from ((first, second, a, None) for a in current[first])
            yield from ((first, second, None, b) for b in current[second])
        yield from ((first, second, a, b) for a in current[first] for b in current[second])
