"""Multistart local search: descent from many starts, then from shaken copies of the best.

The strongest method that proves nothing; it also supplies the exact solver's upper bound.
"""

from __future__ import annotations

import numpy as np

from .descent import descend, objectives
from .partitions import blocks, random_balanced, random_sizes
from .problem import Problem
from .registry import Found

_KEPT = 16  # partitions shaken in each round
_BATCH = 32  # partitions a descent works on at once: what stays in cache at H = 64


def solve(problem: Problem, starts: int = 128, rounds: int = 24) -> Found:
    """Best partition found.

    Args:
        starts: random partitions to descend from.
        rounds: how often the best are shaken (a few random swaps) and descended from again.
    """
    if starts < 1 or rounds < 0:
        raise ValueError(f"starts must be >= 1 and rounds >= 0, got {starts} and {rounds}")
    rng = problem.rng()
    pool = np.stack([_start(problem, rng, i) for i in range(starts)])
    pool = np.concatenate(
        [descend(problem, pool[i : i + _BATCH]) for i in range(0, starts, _BATCH)]
    )
    return Found(_shaken(problem, pool, rounds, rng))


def _start(problem: Problem, rng: np.random.Generator, i: int) -> np.ndarray:
    """Even starts are balanced, odd ones have random sizes."""
    if i % 2 == 0:
        return random_balanced(problem, rng)
    return rng.permutation(blocks(random_sizes(problem, rng)))


def _shaken(
    problem: Problem, pool: np.ndarray, rounds: int, rng: np.random.Generator
) -> np.ndarray:
    """The best partition after ``rounds`` of shaking the best of the pool and descending again."""
    D, G, H = problem.distances, problem.num_groups, problem.num_heads
    values = objectives(D, pool)
    order = np.argsort(values, kind="stable")[:_KEPT]
    pool, values = pool[order], values[order]
    for _ in range(rounds if 1 < G < H else 0):
        if problem.time_left() <= 0:
            break
        shaken = pool.copy()
        for row in shaken:
            for _ in range(rng.integers(2, 2 + max(1, H // 8))):
                i, j = rng.integers(H, size=2)
                row[i], row[j] = row[j], row[i]
        shaken = descend(problem, shaken)
        found = objectives(D, shaken)
        better = found < values
        pool[better], values[better] = shaken[better], found[better]
    return pool[values.argmin()]
