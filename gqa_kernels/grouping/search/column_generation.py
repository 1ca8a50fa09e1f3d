"""Exact optimum for many heads, where the size limits leave few enough groups to list them all."""

from __future__ import annotations

from . import local
from .problem import Problem
from .registry import Found

MAX_COLUMNS = 20_000_000  # about 1 GB at groups of up to 8 heads


def solve(problem: Problem, max_columns: int = MAX_COLUMNS) -> Found:
    """An optimal partition with its proof.

    Args:
        max_columns: where there are more groups than this within the size limits, the result is
            local search's partition with a weak bound.
    """
    from .bounds import nearest_bound  # these import SciPy
    from .columns import number_of_groups
    from .set_partitioning import SetPartitioning

    labels = local.solve(problem).labels
    groups = number_of_groups(problem.num_heads, problem.lo, problem.hi)
    if groups > max_columns or problem.time_left() <= 0:
        return Found(labels, nearest_bound(problem))
    return SetPartitioning(problem, labels).run()
