"""Groups: the query heads and cached heads that are assigned to ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """The heads to assign: groups of query heads that read the same K and V heads.

    Attributes:
        sizes: query heads of each group.
        reads: for each kind of cached head (K and V together, or each its own kind), the head that
            each group reads. Heads are numbered from 0 without gaps.
        query_cost: load of one query head.
        read_cost: load of one cached head of any kind.
    """

    sizes: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    query_cost: int
    read_cost: int

    def held(self, assignment: np.ndarray) -> np.ndarray:
        """Cached heads on each rank, ``[world]``, under an assignment ``[groups, world]``."""
        total = np.zeros(assignment.shape[1], dtype=int)
        for reads in self.reads:
            holds = np.zeros((max(reads) + 1, assignment.shape[1]), dtype=bool)
            np.logical_or.at(holds, list(reads), assignment > 0)
            total += holds.sum(axis=0)
        return total

    def loads(self, assignment: np.ndarray) -> np.ndarray:
        return self.query_cost * assignment.sum(axis=0) + self.read_cost * self.held(assignment)

    def least_held(self, world: int) -> int:
        """Lower bound of the number of cached heads over all ranks."""
        return sum(max(max(reads) + 1, world) for reads in self.reads)

    def least_load(self, world: int) -> int:
        """Lower bound of the largest load."""
        total = self.query_cost * sum(self.sizes) + self.read_cost * self.least_held(world)
        return -(-total // world)
