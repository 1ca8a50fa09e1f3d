"""The search of "Align before merge" (arXiv 2412.20677): random swaps that improve, many restarts.

Its authors call it simulated annealing; it accepts improvements only.
"""

from __future__ import annotations

import numpy as np

from .descent import State, objectives
from .partitions import random_balanced
from .problem import Problem
from .registry import Found


def solve(problem: Problem, restarts: int = 200, swaps: int = 3000) -> Found:
    """Best of ``restarts`` balanced partitions after ``swaps`` random swaps each."""
    if restarts < 1 or swaps < 0:
        raise ValueError(f"restarts must be >= 1 and swaps >= 0, got {restarts} and {swaps}")
    D, H, G = problem.distances, problem.num_heads, problem.num_groups
    rng = problem.rng()
    state = State.of(D, G, np.stack([random_balanced(problem, rng) for _ in range(restarts)]))
    rows = np.arange(restarts)
    for _ in range(swaps):
        if problem.time_left() <= 0:
            break
        i, j = rng.integers(H, size=(2, restarts))
        a, b = state.labels[rows, i], state.labels[rows, j]
        gain_a = state.sums[rows, j, a] - state.sums[rows, i, a] - D[i, j]
        gain_b = state.sums[rows, i, b] - state.sums[rows, j, b] - D[i, j]
        gain = gain_a / state.sizes[rows, a] + gain_b / state.sizes[rows, b]
        better = np.flatnonzero((a != b) & (gain < 0))
        if len(better):
            state.move(D, better, i[better], b[better])
            state.move(D, better, j[better], a[better])
    return Found(state.labels[objectives(D, G, state.labels).argmin()])
