"""The search of "Align before merge" (arXiv 2412.20677): random swaps that improve, many restarts.

Its authors call it simulated annealing; it accepts improvements only.
"""

from __future__ import annotations

import numpy as np

from .core import core
from .descent import State, objectives
from .partitions import random_balanced
from .problem import Problem
from .registry import Found

_CHUNK = 256  # swaps drawn at once


def solve(problem: Problem, restarts: int = 200, swaps: int = 3000) -> Found:
    """Best of ``restarts`` balanced partitions after ``swaps`` random swaps each."""
    if restarts < 1 or swaps < 0:
        raise ValueError(f"restarts must be >= 1 and swaps >= 0, got {restarts} and {swaps}")
    D, H, G = problem.distances, problem.num_heads, problem.num_groups
    rng = problem.rng()
    labels = np.stack([random_balanced(problem, rng) for _ in range(restarts)])
    compiled = core(H)
    for start in range(0, swaps, _CHUNK):
        if problem.time_left() <= 0:
            break
        drawn = rng.integers(H, size=(min(_CHUNK, swaps - start), 2, restarts))
        if compiled is not None:
            labels = compiled.random_swaps(D, G, labels, drawn)
        else:
            labels = _swapped(State.of(D, G, labels), D, drawn)
    return Found(labels[objectives(D, labels).argmin()])


def _swapped(state: State, D: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The partitions after those of the swaps ``[T, 2, B]`` that gain, in turn."""
    rows = np.arange(len(state.labels))
    for i, j in drawn:
        a, b = state.labels[rows, i], state.labels[rows, j]
        gain_a = state.sums[rows, j, a] - state.sums[rows, i, a] - D[i, j]
        gain_b = state.sums[rows, i, b] - state.sums[rows, j, b] - D[i, j]
        gain = gain_a / state.sizes[rows, a] + gain_b / state.sizes[rows, b]
        better = np.flatnonzero((a != b) & (gain < 0))
        if len(better):
            state.move(D, better, i[better], b[better])
            state.move(D, better, j[better], a[better])
    return state.labels
