"""The proven optimum: whichever exact method is faster."""

from __future__ import annotations

from . import column_generation, subset_dp
from .problem import Problem
from .registry import Found

_DP_HEADS = 16  # beyond this, column generation is faster for one number of groups


def solve(problem: Problem) -> Found:
    """An optimal partition with its proof: subset DP up to 16 heads, column generation beyond.

    The subset DP takes a second at most and ignores the time limit. Column generation lists every
    group within the size limits; if those are too many, or time runs out, the result is local
    search's with the best bound known, not proved.
    """
    if problem.num_heads <= _DP_HEADS:
        return subset_dp.solve(problem)
    return column_generation.solve(problem)


def solve_all(problems: list[Problem]) -> list[Found]:
    """Optimal partitions for many numbers of groups: one DP table up to 18 heads."""
    if problems[0].num_heads <= subset_dp.MAX_HEADS:
        return subset_dp.solve_all(problems)
    return [column_generation.solve(p) for p in problems]
