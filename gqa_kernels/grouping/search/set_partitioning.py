"""Exact optimum for many heads: enumerated column generation with reduced-cost fixing.

1. Local search finds a partition, hence an upper bound.
2. All groups within the size limits are listed. The LP relaxation of "every head in exactly one of
   exactly G groups" is solved over a few of them; its prices are tried on all groups and the
   cheapest are added, until none is missing.
3. Any prices ``p`` with cut prices ``q <= 0`` bound every partition from below by
   ``sum p + sum q + G * min reduced cost``. A group whose reduced cost exceeds the least one by
   more than (upper - lower bound) is in no better partition: it is dropped.
4. Where many groups are left, an integer program over the most promising may improve the partition;
   then subset-row cuts raise the bound, and more groups are dropped.
5. The integer program over what is left ends the search, with a proof.

When time runs out, the best partition is returned with the best bound.
"""

from __future__ import annotations

import numpy as np

from ..objective import TOLERANCE
from .columns import Columns
from .cuts import cut_rows, violated
from .master import choose, relax
from .problem import Problem
from .registry import Found

_UNIT = 1e4  # largest entry of D after scaling: HiGHS's tolerances are absolute, 1e-6 and 1e-7
_DUAL_TOLERANCE = 1e-6
_FIRST_POOL = 4000  # columns of the first LP
_ADDED = 1000  # columns added to the LP at once
_FEW = 3000  # columns few enough to go straight to the integer program
_CUT_LIMIT = 400_000  # columns few enough to work with cuts
_CUTS = 60  # cuts added at once
_STALLED = 0.9  # cuts that leave more than this share of the columns are not worth their time
_PROMISING = 2000  # columns, and
_IMPROVE_SECONDS = 10.0  # time, of the integer program that looks for a better partition


class SetPartitioning:
    """The search's state; costs are in units of ``scale / _UNIT``.

    labels, upper: the best partition and its cost. lower: no partition costs less. columns: the
    groups that a partition better than ``upper`` can use; the first G are the starting partition,
    so that every LP is feasible. reduced [n]: their reduced costs under the prices that gave
    ``lower``. pool: indices of the columns in the LP. weights: the LP's solution over the pool.
    triples [C, 3], rows [C, n]: the cuts.
    """

    def __init__(self, problem: Problem, labels: np.ndarray):
        self.problem, self.G = problem, problem.num_groups
        self.unit = problem.scale / _UNIT
        D = problem.distances / self.unit
        start = Columns.of_partition(D, labels, problem.hi)
        self.labels, self.upper, self.lower = labels, float(start.costs.sum()), -np.inf
        self.columns = start + Columns.enumerate(D, problem.lo, problem.hi)
        self.set_cuts(np.zeros((0, 3), np.intp))
        # each head's share of its group's cost: good first prices
        share = (D * (labels[:, None] == labels)).sum(1) / (2 * np.bincount(labels)[labels])
        self.use_prices(share, np.zeros(0))
        self.pool = np.union1d(np.arange(self.G), _smallest(self.reduced, _FIRST_POOL))

    def run(self) -> Found:
        in_time = self.raise_bound()
        if in_time and len(self.columns) > _FEW:
            self.improve()
        while in_time and _FEW < len(self.columns) <= _CUT_LIMIT and not self.closed():
            left = len(self.columns)
            found = violated(self.columns.take(self.pool), self.weights, _CUTS)
            if not len(found):
                break
            self.set_cuts(np.unique(np.concatenate((self.triples, found)), axis=0))
            in_time = self.raise_bound()
            if len(self.columns) > _STALLED * left:
                break
        if in_time and not self.closed():
            self.finish()
        return Found(self.labels, min(self.lower, self.upper) * self.unit)

    def closed(self) -> bool:
        return self.upper - self.lower <= TOLERANCE * max(self.upper, _UNIT) / 2

    def set_cuts(self, triples: np.ndarray) -> None:
        self.triples, self.rows = triples, cut_rows(self.columns, triples)

    def use_prices(self, prices: np.ndarray, cut_prices: np.ndarray) -> np.ndarray:
        """Reduced costs ``[n]`` under some prices; kept if the prices raise the bound."""
        reduced = self.columns.reduced_costs(prices)
        if len(cut_prices):
            reduced -= self.rows.T @ cut_prices
        lower = prices.sum() + cut_prices.sum() + self.G * reduced.min()
        if lower > self.lower:
            self.lower, self.reduced = float(lower), reduced
        return reduced

    def raise_bound(self) -> bool:
        """Solve the LP relaxation over all columns, then drop columns. False if time ran out."""
        while True:
            columns, rows = self.columns.take(self.pool), self.rows[:, self.pool]
            solved = relax(columns, self.G, rows, self.problem.time_left())
            if solved is None:
                return False
            reduced = self.use_prices(solved.prices, solved.cut_prices)
            missing = np.flatnonzero(reduced < solved.count_price - _DUAL_TOLERANCE)
            missing = np.setdiff1d(missing, self.pool, assume_unique=True)
            if not len(missing):
                break
            missing = missing[_smallest(reduced[missing], _ADDED)]
            self.pool = np.union1d(self.pool, missing)
        self.weights = solved.weights
        if len(self.triples):
            self.set_cuts(self.triples[solved.cut_prices < 0])
        self.drop()
        return True

    def drop(self) -> None:
        """Forget the columns that are in no partition better than the best known."""
        slack = TOLERANCE * max(self.upper, _UNIT)
        keep = self.reduced - self.reduced.min() <= self.upper - self.lower + slack
        keep[: self.G] = True
        place = np.cumsum(keep) - 1
        in_pool = keep[self.pool]
        self.pool, self.weights = place[self.pool[in_pool]], self.weights[in_pool]
        index = np.flatnonzero(keep)
        self.columns, self.reduced = self.columns.take(index), self.reduced[index]
        self.rows = self.rows[:, index]

    def improve(self) -> None:
        """Look for a better partition among the columns of least reduced cost."""
        promising = np.union1d(np.arange(self.G), _smallest(self.reduced, _PROMISING))
        seconds = min(_IMPROVE_SECONDS, self.problem.time_left() / 2)
        columns = self.columns.take(promising)
        self.adopt(columns, choose(columns, self.G, seconds, relative_gap=1e-3)[0])
        self.drop()

    def finish(self) -> None:
        """Solve the integer program over the columns left."""
        chosen, bound = choose(self.columns, self.G, self.problem.time_left())
        self.adopt(self.columns, chosen)
        self.lower = max(self.lower, min(bound, self.upper))

    def adopt(self, columns: Columns, chosen: np.ndarray | None) -> None:
        if chosen is not None and columns.costs[chosen].sum() < self.upper:
            self.labels, self.upper = columns.labels(chosen), float(columns.costs[chosen].sum())


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` smallest values, in no order."""
    if len(values) <= count:
        return np.arange(len(values))
    return np.argpartition(values, count)[:count]
