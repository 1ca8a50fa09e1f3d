"""The mixed-integer program behind ``assign``, for head maps that no simple split solves."""

from __future__ import annotations

from typing import Any

import numpy as np

from .groups import Groups


def solve(groups: Groups, world: int) -> np.ndarray:
    """Solve it with SciPy's HiGHS.

    Variables: the number of heads of group g on rank r; for each kind, whether rank r holds cached
    head h; the largest load. One unit of the largest load outweighs all possible replicas
    together."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_array, csr_array, eye_array, kron
    except ImportError as error:
        raise ImportError(
            "cutting this head map optimally needs SciPy: pip install 'gqa-kernels[grouping]'"
        ) from error

    def per_rank(num_rows: int) -> Any:  # sums of [rows, world] variables over the rows
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
        reading = kron(csr_array(one, shape=(num_groups, sum(counts))), ranks)
        chosen = reading if held_before == 0 else block_array([[chosen], [reading]])
        held_before += count
    query_load = groups.query_cost * per_rank(num_groups)
    held_load = groups.read_cost * per_rank(sum(counts))
    order = eye_array(world - 1, world) - eye_array(world - 1, world, k=1)
    heads_needing = block_array([[eye_array(num_heads)]] * len(counts))
    ones = np.ones((world, 1))

    def rows(on_heads: Any, on_held: Any, on_largest: Any, low: Any, high: Any) -> Any:
        count = on_heads.shape[0]
        on_held = csr_array((count, num_held)) if on_held is None else on_held
        on_largest = csr_array((count, 1)) if on_largest is None else csr_array(on_largest)
        return LinearConstraint(block_array([[on_heads, on_held, on_largest]]), low, high)

    result = milp(
        np.concatenate([np.zeros(num_heads), np.ones(num_held), [num_held + 1.0]]),
        constraints=[
            rows(place_all, None, None, groups.sizes, groups.sizes),
            rows(per_rank(num_groups), None, None, 1, np.inf),  # no rank is empty
            rows(heads_needing, -chosen, None, -np.inf, 0),  # a head needs its K and V on the rank
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
