"""Lower bounds that need no list of groups."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from .problem import Problem

_STEPS = 400
_PATIENCE = 15  # steps without a better bound after which steps get shorter
_SHORTER = 0.6


def nearest_bound(problem: Problem) -> float:
    """Each head in a group of ``s`` is charged as if it sat with its ``s - 1`` nearest heads.

    ``(1/s) * sum_{i<j in S} D_ij`` is the sum over the group's heads of ``1/(2s)`` times their
    distances inside the group, so a head's charge ``c_i(s)`` is at most its true share. The bound
    is the linear program that spreads each head over sizes, ``m_s`` groups of size ``s``:
    ``sum_i y_is = s * m_s`` and ``sum_s m_s = G``. Its dual values, not its optimum, make the
    bound, so that solver tolerances can't make it too high. 0 if the program is not solved.
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


def semidefinite_bound(problem: Problem, upper: float) -> float:
    """Bound of Peng and Wei's semidefinite relaxation of clustering (SIAM J. Optim. 2007).

    With ``Z_ij = 1/|S|`` if ``i`` and ``j`` share a group ``S``, else 0, a partition costs
    ``tr(D Z) / 2``, and ``Z`` is a projection of rank ``G`` with ``Z 1 = 1``,
    ``0 <= Z_ij <= Z_ii`` and ``1/hi <= Z_ii <= 1/lo``. Multipliers for these inequalities turn
    ``D / 2`` into some ``C``; the least ``tr(C Z)`` over projections with ``Z 1 = 1`` is
    ``1'C1 / H`` plus the ``G - 1`` smallest eigenvalues of ``C`` across from ``1``. Any
    multipliers give a bound: subgradient steps (Polyak) look for good ones.

    Args:
        upper: cost of some partition.
    """
    H, G = problem.num_heads, problem.num_groups
    least, most = 1 / problem.hi, 1 / problem.lo
    D, target = problem.distances / problem.scale, upper / problem.scale
    across = np.linalg.qr(np.column_stack((np.ones(H), np.eye(H)[:, 1:])))[0][:, 1:]
    # multipliers of Z_ij >= 0, Z_ij <= Z_ii, Z_ii >= least, Z_ii <= most
    sign, row = np.zeros((H, H)), np.zeros((H, H))
    low, high = np.zeros(H), np.zeros(H)
    best, length, since = 0.0, 1.0, 0
    for _ in range(_STEPS):
        if problem.time_left() <= 0:
            break
        C = D / 2 - sign + (row + row.T) / 2 + np.diag(high - low - row.sum(1))
        values, vectors = np.linalg.eigh(across.T @ C @ across)
        bound = C.sum() / H + values[: G - 1].sum() + low.sum() * least - high.sum() * most
        since = 0 if bound > best else since + 1
        best = max(best, float(bound))
        if since > _PATIENCE:
            length, since = length * _SHORTER, 0
        part = across @ vectors[:, : G - 1]
        Z = 1 / H + part @ part.T
        diagonal = np.diagonal(Z)
        # what each inequality is violated by: the multipliers' ascent direction
        steps = [-Z, Z - diagonal[:, None], least - diagonal, diagonal - most]
        np.fill_diagonal(steps[0], 0)
        multipliers = [sign, row, low, high]
        for step, multiplier in zip(steps, multipliers, strict=True):
            step[(multiplier <= 0) & (step < 0)] = 0
        square = sum((step**2).sum() for step in steps)
        if square == 0 or target - best <= 0:
            break
        size = length * (target - bound) / square
        sign, row, low, high = (
            np.maximum(m + size * step, 0) for m, step in zip(multipliers, steps, strict=True)
        )
    return min(best * problem.scale, upper)
