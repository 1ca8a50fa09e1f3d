"""Exact optimum for few heads by dynamic programming over subsets.

``best[R, g]`` is the cheapest partition of the heads ``R`` into ``g`` groups: the minimum, over the
groups ``S`` within ``R`` that hold R's first head, of ``cost(S) + best[R - S, g - 1]``. One table
answers every number of groups. A set of heads is the bit mask of its members. Head 0 is always in
the first group, so only subsets of the other ``n = H - 1`` heads and the full set are needed: about
``3^n / 2`` pairs (R, S).
"""

from __future__ import annotations

import numpy as np

from .core import core
from .problem import Problem
from .registry import Found

MAX_HEADS = 18
_CHUNK = 1 << 18  # table entries read at once: 2 MiB


def solve(problem: Problem) -> Found:
    """An optimal partition, with its proof."""
    table = _table(problem, problem.lo, problem.hi, problem.num_groups)
    return table.found(problem.num_groups)


def solve_all(problems: list[Problem]) -> list[Found]:
    """Optimal partitions for many numbers of groups, from one table unless sizes are equal."""
    if problems[0].sizes == "equal":
        return [solve(p) for p in problems]
    lo, hi = min(p.lo for p in problems), max(p.hi for p in problems)
    table = _table(problems[0], lo, hi, max(p.num_groups for p in problems))
    return [table.found(p.num_groups) for p in problems]


def _table(problem: Problem, lo: int, hi: int, num_groups: int) -> Table:
    """The table for groups of ``lo`` to ``hi`` heads."""
    D, n = problem.distances, problem.num_heads - 1
    if n >= MAX_HEADS:
        raise ValueError(f"D must have at most {MAX_HEADS} heads for the subset DP, got {n + 1}")
    size = _head_counts(n)
    pairs, first = np.zeros(1 << n), np.zeros(1 << n)
    for i in range(n):
        low, high = slice(0, 1 << i), slice(1 << i, 2 << i)
        to_i = np.zeros(1)  # sum of the distances from head i + 1 to the mask's heads
        for j in range(i):
            to_i = np.concatenate((to_i, to_i + D[i + 1, j + 1]))
        pairs[high] = pairs[low] + to_i
        first[high] = first[low] + D[0, i + 1]
    allowed = (lo <= size) & (size <= hi)
    without = np.where(allowed, pairs / np.maximum(size, 1), np.inf)
    allowed = (lo <= size + 1) & (size + 1 <= hi)
    with_first = np.where(allowed, (pairs + first) / (size + 1), np.inf)
    return Table(without, with_first, n + 1, lo, hi, num_groups)


class Table:
    """``best [2^n, G + 1]`` over subsets of heads 1..n, and the costs of all groups.

    Args:
        without: ``[2^n]`` cost of a group of the heads 1..n in the mask, inf if it is not
            allowed.
        with_first: ``[2^n]`` the same group with head 0 as well.
        num_heads: ``n + 1``.
        lo, hi: group sizes allowed.
        num_groups: largest number of groups that will be asked for.
    """

    def __init__(
        self,
        without: np.ndarray,
        with_first: np.ndarray,
        num_heads: int,
        lo: int,
        hi: int,
        num_groups: int,
    ):
        n = num_heads - 1
        self.without, self.with_first, self.num_heads = without, with_first, num_heads
        self.lo, self.hi = lo, hi
        compiled = core(num_heads)
        if compiled is not None:
            self.best = compiled.subset_table(without, lo, hi, num_groups)
            return
        size = _head_counts(n)
        self.best = np.full((1 << n, num_groups + 1), np.inf)
        self.best[0, 0] = 0.0
        by_size = np.argsort(size, kind="stable")
        ends = np.searchsorted(size[by_size], np.arange(n + 2))
        for p in range(lo, n + 1):
            # groups that p heads can form; one more group must still fit around them
            fewest, most = -(-p // hi), min(p // lo, num_groups - 1)
            if fewest <= most:
                self._fill(by_size[ends[p] : ends[p + 1]], p, fewest, most)

    def _fill(self, masks: np.ndarray, p: int, fewest: int, most: int) -> None:
        """Set ``best[masks, fewest .. most]``; every mask has ``p`` heads."""
        size = 1 + _head_counts(p - 1)  # of the groups of a mask, in _groups' order
        keep = np.flatnonzero((self.lo <= size) & (size <= self.hi))
        step = max(1, _CHUNK // (len(keep) * (most - fewest + 1)))
        for start in range(0, len(masks), step):
            some = masks[start : start + step]
            groups = _groups(some, p)
            if len(keep) < len(size):
                groups = groups[:, keep]
            values = self.best[some[:, None] ^ groups, fewest - 1 : most]
            values += self.without[groups][..., None]
            self.best[some, fewest : most + 1] = values.min(1)

    def found(self, num_groups: int) -> Found:
        """An optimal partition into ``num_groups`` groups, by walking back through the table."""
        n = self.num_heads - 1
        labels = np.zeros(self.num_heads, dtype=np.intp)
        subsets = np.arange(1 << n)
        rest = (1 << n) - 1
        values = self.with_first + self.best[subsets ^ rest, num_groups - 1]
        group = int(values.argmin())
        bound = float(values[group])
        for g in range(num_groups - 1, 0, -1):
            rest ^= group
            inside = subsets[(subsets & ~rest == 0) & (subsets & (rest & -rest) != 0)]
            group = int(inside[(self.without[inside] + self.best[rest ^ inside, g - 1]).argmin()])
            labels[1:][(group >> np.arange(n)) & 1 == 1] = g
        return Found(labels, bound)


def _head_counts(n: int) -> np.ndarray:
    """``[2^n]`` number of heads in each mask."""
    counts = np.zeros(1, dtype=np.int64)
    for _ in range(n):
        counts = np.concatenate((counts, counts + 1))
    return counts


def _groups(masks: np.ndarray, p: int) -> np.ndarray:
    """``[M, 2^(p-1)]``: the subsets of each mask (of ``p`` heads) that hold its first head."""
    first = masks & -masks
    groups, rest = first[:, None], masks ^ first
    for _ in range(p - 1):
        head = rest & -rest
        groups = np.concatenate((groups, groups + head[:, None]), axis=1)
        rest = rest ^ head
    return groups
