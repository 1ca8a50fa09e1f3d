"""Exact optimum for many heads, if the size limits leave few enough groups to list them all."""

from __future__ import annotations

from ..objective import objective
from . import local
from .problem import Problem
from .registry import Found

MAX_COLUMNS = 20_000_000  # about 1 GB at groups of up to 8 heads


def solve(problem: Problem, max_columns: int = MAX_COLUMNS) -> Found:
    """An optimal partition with its proof.

    Args:
        max_columns: if there are more groups than this within the size limits, the result is
            local search's partition with the bound of a relaxation, not proved.
    """
    from .bounds import nearest_bound, semidefinite_bound  # these import SciPy
    from .columns import number_of_groups
    from .set_partitioning import SetPartitioning

    labels = local.solve(problem).labels
    groups = number_of_groups(problem.num_heads, problem.lo, problem.hi)
    if groups > max_columns or problem.time_left() <= 0:
        upper = objective(problem.distances, labels)
        return Found(labels, max(nearest_bound(problem), semidefinite_bound(problem, upper)))
    return SetPartitioning(problem, labels).run()
