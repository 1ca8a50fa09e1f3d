"""assign(): how many query heads of each group go to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .groups import Groups
from .program import solve


@lru_cache(maxsize=256)
def assign(groups: Groups, world: int) -> tuple[tuple[int, ...], ...]:
    """How many query heads of each group go to every rank, ``[groups][world]``.

    Every rank gets at least one.

    Raises:
        ImportError: the mixed-integer program is needed and SciPy is missing.
    """
    for simple in (_consecutive(groups.sizes, world), _largest_first(groups, world)):
        if (
            simple.sum(axis=0).min() > 0
            and groups.loads(simple).max() <= groups.least_load(world)
            and groups.held(simple).sum() <= groups.least_held(world)
        ):
            return _as_tuples(simple)
    return _as_tuples(solve(groups, world))


def _consecutive(sizes: Sequence[int], world: int) -> np.ndarray:
    """The heads, group after group, split into runs whose lengths differ by at most one."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    cuts = sum(sizes) * np.arange(world + 1) // world
    overlap = np.minimum(ends[:, None], cuts[1:]) - np.maximum(begins[:, None], cuts[:-1])
    return np.maximum(overlap, 0)


def _largest_first(groups: Groups, world: int) -> np.ndarray:
    """Assigns whole groups, largest first, each to the least loaded rank."""
    assignment = np.zeros((len(groups.sizes), world), dtype=int)
    for g in sorted(range(len(groups.sizes)), key=lambda g: -groups.sizes[g]):
        assignment[g, groups.loads(assignment).argmin()] = groups.sizes[g]
    return assignment


def _as_tuples(assignment: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(heads) for heads in row) for row in assignment)
