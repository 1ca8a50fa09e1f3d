"""Cutting head maps over the ranks of tensor parallelism, to proven optimality.

Each rank holds whole query heads and just the KV heads that these read; a KV head that two ranks
read is held twice. The load of a rank is ``query_cost * query heads + kv_cost * KV heads``; the
assignment minimises the largest load and, among those, the KV heads held in all, so that a KV head
is replicated only where that lowers the maximum.

Query heads that read the same K and V are alike, so only the sizes of the groups matter: with
``x[g, r]`` the heads of group ``g`` on rank ``r`` this is bin packing with splittable items and
set-up costs. A simple cut that meets the bounds on both counts is taken at once; the rest goes to
SciPy's HiGHS as a mixed-integer program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Groups:
    """What has to be placed: groups of like query heads and the heads of K and V they read.

    Attributes:
        sizes: query heads of each group.
        reads: per kind of cached head (K and V as one kind, or each its own), which head each
            group reads, numbered from 0 without gaps.
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
        """Lower bound of the cached heads that all ranks hold together."""
        return sum(max(max(reads) + 1, world) for reads in self.reads)

    def least_load(self, world: int) -> int:
        """Lower bound of the largest load."""
        total = self.query_cost * sum(self.sizes) + self.read_cost * self.least_held(world)
        return -(-total // world)


@lru_cache(maxsize=256)
def assign(groups: Groups, world: int) -> tuple[tuple[int, ...], ...]:
    """How many query heads of each group every rank takes, ``[groups][world]``; none takes none.

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
    return _as_tuples(_solve(groups, world))


def _consecutive(sizes: Sequence[int], world: int) -> np.ndarray:
    """The heads, group after group, cut into runs whose lengths differ by at most one."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    cuts = sum(sizes) * np.arange(world + 1) // world
    overlap = np.minimum(ends[:, None], cuts[1:]) - np.maximum(begins[:, None], cuts[:-1])
    return np.maximum(overlap, 0)


def _largest_first(groups: Groups, world: int) -> np.ndarray:
    """Whole groups, largest first, each to the least loaded rank."""
    assignment = np.zeros((len(groups.sizes), world), dtype=int)
    for g in sorted(range(len(groups.sizes)), key=lambda g: -groups.sizes[g]):
        assignment[g, groups.loads(assignment).argmin()] = groups.sizes[g]
    return assignment


def _solve(groups: Groups, world: int) -> np.ndarray:
    """The mixed-integer program.

    Variables: heads of group g on rank r; for each kind, whether rank r holds cached head h; the
    largest load. One unit of the largest load outweighs every replica there could be.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_array, csr_array, eye_array, kron
    except ImportError as error:
        raise ImportError(
            "cutting this head map optimally needs SciPy: pip install 'gqa-kernels[grouping]'"
        ) from error

    def per_rank(num_rows: int):  # sums of [rows, world] variables over the rows
        return kron(np.ones((1, num_rows)), eye_array(world))

    num_groups, ranks = len(groups.sizes), eye_array(world)
    capacity = np.repeat(np.asarray(groups.sizes, dtype=float), world)
    counts = [max(reads) + 1 for reads in groups.reads]
    num_heads, num_held = num_groups * world, sum(counts) * world
    place_all = kron(eye_array(num_groups), np.ones((1, world)))
    chosen = csr_array((0, num_held))
    held_before = 0
    for reads, count in zip(groups.reads, counts, strict=True):
        columns = held_before + np.asarray(reads)
        one = (np.asarray(groups.sizes, dtype=float), (np.arange(num_groups), columns))
        rows = kron(csr_array(one, shape=(num_groups, sum(counts))), ranks)
        chosen = rows if held_before == 0 else block_array([[chosen], [rows]])
        held_before += count
    query_load = groups.query_cost * per_rank(num_groups)
    held_load = groups.read_cost * per_rank(sum(counts))
    order = eye_array(world - 1, world) - eye_array(world - 1, world, k=1)
    heads_needing = block_array([[eye_array(num_heads)]] * len(counts))
    ones = np.ones((world, 1))

    def rows(on_heads, on_held, on_largest, low, high):
        count = on_heads.shape[0]
        on_held = csr_array((count, num_held)) if on_held is None else on_held
        on_largest = csr_array((count, 1)) if on_largest is None else csr_array(on_largest)
        return LinearConstraint(block_array([[on_heads, on_held, on_largest]]), low, high)

    result = milp(
        np.concatenate([np.zeros(num_heads), np.ones(num_held), [num_held + 1.0]]),
        constraints=[
            rows(place_all, None, None, groups.sizes, groups.sizes),
            rows(per_rank(num_groups), None, None, 1, np.inf),  # no rank stays empty
            rows(heads_needing, -chosen, None, -np.inf, 0),  # heads only where K and V are
            rows(query_load, held_load, -ones, -np.inf, 0),
            rows(order @ query_load, order @ held_load, None, 0, np.inf),  # ranks are alike
        ],
        bounds=Bounds(
            np.concatenate([np.zeros(num_heads + num_held), [groups.least_load(world)]]),
            np.concatenate([capacity, np.ones(num_held), [np.inf]]),
        ),
        integrality=np.ones(num_heads + num_held + 1),
        options={"mip_rel_gap": 0},
    )
    return np.rint(result.x[:num_heads]).astype(int).reshape(num_groups, world)


def _as_tuples(assignment: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(heads) for heads in row) for row in assignment)
