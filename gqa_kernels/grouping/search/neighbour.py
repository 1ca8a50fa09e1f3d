"""Adjacent heads together, as ordinary GQA groups them. The baseline of every comparison."""

from __future__ import annotations

from .partitions import balanced_sizes, blocks
from .problem import Problem
from .registry import Found


def solve(problem: Problem) -> Found:
    """Contiguous groups whose sizes differ by at most one."""
    return Found(blocks(balanced_sizes(problem.num_heads, problem.num_groups)))
