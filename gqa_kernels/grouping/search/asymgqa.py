"""AsymGQA's random search (arXiv 2406.14963) with its published parameters.

Each step changes one random head's place: it trades places with, or joins, one of its nearest heads
in other groups. The step is kept if it is the best so far, or by chance. The authors measure the
validation accuracy of the converted model at each step; here the fitness is the objective that
every method here minimises.
"""

from __future__ import annotations

import numpy as np

from .descent import objectives
from .partitions import random_balanced
from .problem import Problem
from .registry import Found


def solve(
    problem: Problem,
    iterations: int = 10,
    candidates: int = 3,
    accept: float = 0.1,
    reset: float = 0.1,
    preserve: float = 1.0,
) -> Found:
    """Best partition met on the walk.

    Args:
        iterations: steps, "n".
        candidates: nearest heads outside the group to choose from, "k".
        accept: probability of keeping a step that is not the best so far, "p_acc".
        reset: probability of starting a step from a new random partition, "p_reset".
        preserve: probability that a step keeps the group sizes (trades places). 1 is the symmetric
            search; below 1 the head otherwise joins the other's group if the size limits allow.
    """
    D, G = problem.distances, problem.num_groups
    rng = problem.rng()
    nearest = np.argsort(D, axis=1, kind="stable")
    current = random_balanced(problem, rng)
    best, best_value = current, objectives(D, current[None])[0]
    for _ in range(iterations if G > 1 else 0):
        if problem.time_left() <= 0:
            break
        if rng.random() < reset:
            current = random_balanced(problem, rng)
        head = rng.integers(problem.num_heads)
        others = nearest[head][current[nearest[head]] != current[head]][:candidates]
        step = _step(problem, current, head, rng.choice(others), rng.random() < preserve)
        value = objectives(D, step[None])[0]
        if value < best_value or rng.random() < accept:
            current = step
            if value < best_value:
                best, best_value = step, value
    return Found(best)


def solve_uneven(
    problem: Problem,
    iterations: int = 10,
    candidates: int = 3,
    accept: float = 0.1,
    reset: float = 0.1,
    preserve: float = 0.2,
) -> Found:
    """``solve`` with steps that change the group sizes. The public code accepts ``preserve`` = 0.2
    but never uses it; joining the nearest head's group is what it appears to be for."""
    return solve(problem, iterations, candidates, accept, reset, preserve)


def _step(
    problem: Problem, labels: np.ndarray, head: int, other: int, keep_sizes: bool
) -> np.ndarray:
    """``labels`` with ``head`` in ``other``'s group, and the reverse if sizes are kept."""
    source, target = labels[head], labels[other]
    can_join = (labels == source).sum() > problem.lo and (labels == target).sum() < problem.hi
    labels = labels.copy()
    labels[head] = target
    if keep_sizes or not can_join:
        labels[other] = source
    return labels
