"""Partitions for every number of groups at once by merging groups, with few costs measured.

Ward's linkage on costs of whole groups: start from single heads and merge two groups at a time, the
two whose merging costs least. What a merge costs is estimated from earlier ones (the recurrence of
Lance and Williams, exact if costs are sums over pairs); only the most promising are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_MEASURED = 4  # merges measured at each step


def agglomerate(
    cost: Callable[[Sequence[int]], float], pairs: np.ndarray, *, known: bool, fewest: int = 1
) -> dict[int, tuple[list[int], float]]:
    """``{G: (labels, cost)}`` for every ``G`` from ``H`` to ``fewest``.

    Args:
        cost: of a group, its heads ascending.
        pairs: ``[H, H]`` the cost of each group of two heads.
        known: False if ``pairs`` are estimates.
    """
    H = len(pairs)
    groups: dict[int, tuple[int, ...]] = {h: (h,) for h in range(H)}
    costs = {h: cost((h,)) for h in range(H)}
    alone = np.array(list(costs.values()))
    rise = pairs - alone[:, None] - alone  # of the total when two groups merge, estimated or known
    np.fill_diagonal(rise, np.inf)
    measured = np.full((H, H), known)
    found = {H: (list(range(H)), float(alone.sum()))}
    while len(groups) > fewest:
        for _ in range(_MEASURED):
            a, b = _least(rise)
            if measured[a, b]:
                break
            rise[a, b] = rise[b, a] = cost(_merged(groups, a, b)) - costs[a] - costs[b]
            measured[a, b] = measured[b, a] = True
        a, b = _least(np.where(measured, rise, np.inf))
        total = cost(_merged(groups, a, b))
        n, m = len(groups[a]), len(groups[b])
        groups[a], costs[a] = _merged(groups, a, b), total
        step = rise[a, b]
        for c, group in groups.items():
            if c not in (a, b):
                k = len(group)
                new = ((n + k) * rise[a, c] + (m + k) * rise[b, c] - k * step) / (n + m + k)
                rise[a, c] = rise[c, a] = new
                measured[a, c] = measured[c, a] = False
        del groups[b], costs[b]
        rise[b] = rise[:, b] = np.inf
        labels = [0] * H
        for g, group in enumerate(groups.values()):
            for h in group:
                labels[h] = g
        found[len(groups)] = labels, sum(costs.values())
    return found


def _least(values: np.ndarray) -> tuple[int, int]:
    a, b = np.unravel_index(values.argmin(), values.shape)
    return int(a), int(b)


def _merged(groups: dict[int, tuple[int, ...]], a: int, b: int) -> tuple[int, ...]:
    return tuple(sorted(groups[a] + groups[b]))
