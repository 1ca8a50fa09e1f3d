"""Partition search: ``search(D, num_groups, method=...)``. One method a file, all listed here."""

from __future__ import annotations

import time

from numpy.typing import ArrayLike

from ..objective import TOLERANCE, as_distances, objective
from ..result import SearchResult, Sizes, canonical_labels
from . import (
    align,
    asymgqa,
    column_generation,
    exact,
    hierarchical,
    key_norm,
    local,
    neighbour,
    nsga2,
    random,
    subset_dp,
)
from .group_costs import search_groups, search_groups_curve
from .problem import Problem, check_sizes, size_limits
from .registry import Found, Method

__all__ = ["METHODS", "search", "search_curve", "search_groups", "search_groups_curve"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("neighbour", "adjacent heads together, as ordinary GQA", neighbour.solve),
        Method("random", "a random balanced partition", random.solve),
        Method("key_norm", "sizes from key norms (KDGQA, DGQA)", key_norm.solve),
        Method("asymgqa", "AsymGQA's symmetric random search", asymgqa.solve),
        Method("asymgqa_uneven", "AsymGQA's search with uneven steps", asymgqa.solve_uneven),
        Method("align", "Align's random swaps and restarts", align.solve),
        Method("hierarchical", "Ward, other linkages", hierarchical.solve, hierarchical.solve_all),
        Method("nsga2", "QCQA's NSGA-II (needs pymoo)", nsga2.solve),
        Method("local", "multistart swaps and moves", local.solve),
        Method("subset_dp", "exact, H <= 18", subset_dp.solve, subset_dp.solve_all),
        Method("column_generation", "exact, set partitioning on HiGHS", column_generation.solve),
        Method("exact", "the faster of the exact methods", exact.solve, exact.solve_all),
    )
}


def search(
    D: ArrayLike,
    num_groups: int,
    method: str = "exact",
    sizes: Sizes = "free",
    seed: int = 0,
    time_limit: float | None = None,
    **options,
) -> SearchResult:
    """Partition ``H`` heads into ``num_groups`` groups of similar heads.

    Minimises the sum over groups ``S`` of ``(1/|S|) * sum_{i<j in S} D_ij``.

    Args:
        D: ``[H, H]`` dissimilarities (symmetric, non-negative, zero diagonal), or an object with
            such an ``.array``.
        num_groups: ``G``, exactly; no group is empty.
        method: a key of ``METHODS``.
        sizes: ``"free"``, ``"equal"`` (``H`` must be a multiple of ``G``) or ``(lo, hi)``, the
            smallest and largest group allowed.
        seed: seed of every random choice; the same call returns the same result, unless it
            reaches its time limit.
        time_limit: seconds after which to return the best partition found so far.
        **options: the method's own, see its file.

    Raises:
        ValueError: D, num_groups or sizes breaks a rule above, or the method is unknown.
        TypeError: an option the method doesn't have.

    Examples:
        >>> from gqa_kernels.grouping import search
        >>> D = [[0, 1, 4], [1, 0, 4], [4, 4, 0]]
        >>> found = search(D, num_groups=2)
        >>> found.labels, found.objective, found.proved
        ((0, 0, 1), 0.5, True)
    """
    started = time.perf_counter()
    chosen = check_method(method)
    chosen.check_options(options)
    problem = Problem.create(D, num_groups, sizes, seed, time_limit)
    return _result(problem, chosen.solve(problem, **options), started, method)


def search_curve(
    D: ArrayLike,
    method: str = "exact",
    sizes: Sizes = "free",
    seed: int = 0,
    time_limit: float | None = None,
    **options,
) -> dict[int, SearchResult]:
    """``search`` for every number of groups that the size rule allows, ``{G: result}``.

    Methods that can (subset DP, linkages) work out all of them at once; then each result's
    ``seconds`` is the time of the whole curve. ``time_limit`` is for each number of groups.

    Examples:
        >>> from gqa_kernels.grouping import search_curve
        >>> D = [[0, 1, 4], [1, 0, 4], [4, 4, 0]]
        >>> {groups: found.objective for groups, found in search_curve(D).items()}
        {1: 3.0, 2: 0.5, 3: 0.0}
    """
    chosen = check_method(method)
    chosen.check_options(options)
    sizes = check_sizes(sizes)
    D = as_distances(D)
    possible = [G for G in range(1, len(D) + 1) if _feasible(sizes, len(D), G)]
    if not possible:
        raise ValueError(f"sizes must allow some number of groups of {len(D)} heads, got {sizes}")
    if chosen.solve_all is None:
        return {G: search(D, G, method, sizes, seed, time_limit, **options) for G in possible}
    started = time.perf_counter()
    problems = [Problem.create(D, G, sizes, seed, time_limit) for G in possible]
    found = chosen.solve_all(problems, **options)
    return {
        p.num_groups: _result(p, f, started, method) for p, f in zip(problems, found, strict=True)
    }


def check_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def _feasible(sizes: Sizes, num_heads: int, num_groups: int) -> bool:
    try:
        size_limits(sizes, num_heads, num_groups)
    except ValueError:
        return False
    return True


def _result(problem: Problem, found: Found, started: float, method: str) -> SearchResult:
    labels = canonical_labels(found.labels)
    value = objective(problem.distances, labels)
    bound = min(max(found.lower_bound, 0.0), value)
    return SearchResult(
        labels=labels,
        objective=value,
        lower_bound=bound,
        proved=value - bound <= TOLERANCE * max(value, problem.scale),
        seconds=time.perf_counter() - started,
        method=method,
        sizes=problem.sizes,
    )
