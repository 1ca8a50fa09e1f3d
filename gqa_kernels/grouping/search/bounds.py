"""A quick lower bound that needs no list of groups."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from .problem import Problem


def nearest_bound(problem: Problem) -> float:
    """Each head in a group of ``s`` is charged as if it sat with its ``s - 1`` nearest heads.

    ``(1/s) * sum_{i<j in S} D_ij`` is the sum over the group's heads of ``1/(2s)`` times their
    distances inside the group, so a head's charge ``c_i(s)`` is at most its true share. The bound
    is the linear program that spreads each head over sizes, ``m_s`` groups of size ``s``:
    ``sum_i y_is = s * m_s`` and ``sum_s m_s = G``. Its dual values, not its optimum, make the
    bound, so that solver tolerances can't make it too high. 0 where the program is not solved.
    """
    H, G = problem.num_heads, problem.num_groups
    sizes = np.arange(problem.lo, problem.hi + 1)
    D = problem.distances / problem.scale
    nearest = np.cumsum(np.sort(D, axis=1), axis=1)  # the head itself comes first, at distance 0
    charges = nearest[:, sizes - 1] / (2 * sizes)  # [H, S]
    S = len(sizes)
    head, size = (index.ravel() for index in np.indices((H, S)))
    y, m = np.arange(H * S), H * S + np.arange(S)
    rows = np.concatenate((head, H + size, H + np.arange(S), np.full(S, H + S)))
    columns = np.concatenate((y, y, m, m))
    values = np.concatenate((np.ones(2 * H * S), -sizes, np.ones(S)))
    solved = linprog(
        np.append(charges.ravel(), np.zeros(S)),
        A_eq=coo_array((values, (rows, columns))).tocsc(),
        b_eq=np.concatenate((np.ones(H), np.zeros(S), [G])),
    )
    if solved.status != 0:
        return 0.0
    # With prices v_s per head of size s, a group of size s pays s * v_s for its place: any v_s give
    # the bound sum_i min_s (c_i(s) - v_s) + G * min_s (s * v_s).
    prices = solved.eqlin.marginals[H : H + S]
    bound = (charges - prices).min(1).sum() + G * (sizes * prices).min()
    return max(0.0, float(bound)) * problem.scale
