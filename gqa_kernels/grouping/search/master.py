"""The set-partitioning problem over given columns: its LP relaxation with cuts, and its integer
program. Both are solved by HiGHS through SciPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from .columns import Columns


class Relaxation(NamedTuple):
    """Solution of an LP relaxation.

    Attributes:
        weights: ``[n]`` value of each column.
        prices: ``[H]`` dual value of each head.
        count_price: dual value of the number of groups.
        cut_prices: ``[C]`` dual values of the cuts, each <= 0.
    """

    weights: np.ndarray
    prices: np.ndarray
    count_price: float
    cut_prices: np.ndarray


def relax(
    columns: Columns, num_groups: int, cut_rows: csr_array, seconds: float
) -> Relaxation | None:
    """Cheapest weights so that every head is covered once by ``num_groups`` columns in all.

    Args:
        cut_rows: ``[C, n]``; each row's weighted sum may not exceed 1.
        seconds: time limit; when it is reached, the result is None.
    """
    H = columns.num_heads
    cuts = {"A_ub": cut_rows, "b_ub": np.ones(cut_rows.shape[0])} if cut_rows.shape[0] else {}
    solved = linprog(
        columns.costs,
        A_eq=columns.partition_rows(),
        b_eq=np.append(np.ones(H), num_groups),
        method="highs-ds",
        options=_limit(seconds),
        **cuts,
    )
    if solved.status != 0:
        return None
    duals = solved.eqlin.marginals
    cut_prices = np.minimum(solved.ineqlin.marginals, 0.0) if cuts else np.zeros(0)
    return Relaxation(solved.x, duals[:H], float(duals[H]), cut_prices)


def choose(
    columns: Columns, num_groups: int, seconds: float, relative_gap: float = 0.0
) -> tuple[np.ndarray | None, float]:
    """Cheapest partition made of the given columns.

    Returns:
        Indices of its columns, or None if none was found in time, and a lower bound on the cost of
        any partition made of the columns (-inf if none is known, inf if there is no partition).
    """
    exactly = np.append(np.ones(columns.num_heads), num_groups)
    solved = milp(
        columns.costs,
        constraints=LinearConstraint(columns.partition_rows(), exactly, exactly),
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": relative_gap, **_limit(seconds)},
    )
    chosen = None if solved.x is None else np.flatnonzero(solved.x > 0.5)
    if solved.status == 2:
        return None, np.inf
    bound = solved.mip_dual_bound
    return chosen, -np.inf if bound is None else float(bound)


def _limit(seconds: float) -> dict[str, float]:
    return {"time_limit": max(seconds, 1e-3)} if np.isfinite(seconds) else {}
