"""The search op: methods that partition heads, as contestants on the same matrices.

Ours are those that prove their optimum and local search; the published ones are peers. How good a
method's partition is stands in its row beside its time: a fast method that leaves half the gain on
the table is no win. ``studies/search.py`` runs the same methods on more and on real matrices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from gqa_kernels.grouping import search
from gqa_kernels.grouping.objective import TOLERANCE, objective
from gqa_kernels.grouping.result import SearchResult, Sizes
from gqa_kernels.grouping.search.subset_dp import MAX_HEADS

from ..data.instances import SearchCase, instance
from ..peers.base import Contestant, Prepared

RUNS: dict[str, tuple[str, dict]] = {  # what a row is called -> method, options
    "neighbour": ("neighbour", {}),
    "AsymGQA, 10 steps": ("asymgqa", {}),
    "AsymGQA, 200 steps": ("asymgqa", {"iterations": 200}),
    "AsymGQA, 2000 steps": ("asymgqa", {"iterations": 2000}),
    "AsymGQA uneven, 2000 steps": ("asymgqa_uneven", {"iterations": 2000}),
    "Align, 1 x 3000": ("align", {"restarts": 1}),
    "Align, 200 x 3000": ("align", {}),
    "NSGA-II, 10 generations": ("nsga2", {}),
    "NSGA-II, 100 generations": ("nsga2", {"generations": 100}),
    "average linkage": ("hierarchical", {"linkage": "average"}),
    "complete linkage": ("hierarchical", {"linkage": "complete"}),
    "Ward": ("hierarchical", {}),
    "local search": ("local", {}),
    "exact": ("exact", {}),
}
EXACT: dict[str, tuple[str, dict]] = {  # what "exact" chooses between
    "subset DP": ("subset_dp", {}),
    "column generation": ("column_generation", {}),
}
OURS = ("exact", "local", "subset_dp", "column_generation")  # methods; the others are published
RANDOM_RUNS = 100


def mean_random_objective(D: np.ndarray, groups: int, sizes: Sizes) -> float:
    """What no method at all gives: the mean over random balanced partitions."""
    found = [search(D, groups, "random", sizes, seed=i).objective for i in range(RANDOM_RUNS)]
    return float(np.mean(found))


@dataclass(frozen=True)
class SearchProblem:
    """The matrix of a case, ``[H, H]``; searches run on the CPU, whatever the device."""

    case: SearchCase
    distances: np.ndarray
    copies: tuple[int, ...] = (0,)

    @classmethod
    def build(cls, case: SearchCase, device: torch.device) -> SearchProblem:
        return cls(case, instance(case.family, case.heads))

    @cached_property
    def random_objective(self) -> float:
        return mean_random_objective(self.distances, self.case.groups, self.case.sizes)


class SearchGate:
    """A valid partition within the size rule, its objective recomputed, bounds that hold.

    A bound or a claim of optimality is refused where a better partition is known: from the exact
    subset DP on few heads, else from local search, and from every result that passed before.
    """

    def __init__(self, problem: SearchProblem):
        self.problem = problem
        self.proved: float | None = None
        method = "subset_dp" if problem.case.heads <= MAX_HEADS else "local"
        known = search(problem.distances, problem.case.groups, method, problem.case.sizes)
        self.best = objective(problem.distances, known.labels)

    @property
    def slack(self) -> float:
        return TOLERANCE * max(self.best, float(self.problem.distances.max()))

    def check(self, result: SearchResult) -> None:
        """Raises AssertionError, saying what is wrong, for a wrong result."""
        case, D = self.problem.case, self.problem.distances
        sizes = np.bincount(result.labels, minlength=case.groups)
        assert len(result.labels) == case.heads, f"labels: {len(result.labels)}, not {case.heads}"
        assert len(sizes) == case.groups and sizes.min() > 0, f"groups: sizes {sizes.tolist()}"
        low, high = _limits(case)
        assert low <= sizes.min() and sizes.max() <= high, f"sizes {sizes.tolist()}: {case.rule}"
        value = objective(D, result.labels)
        assert abs(value - result.objective) <= self.slack, (
            f"objective: {result.objective} given, {value} of the labels"
        )
        best = min(self.best, value)
        assert result.lower_bound <= best + self.slack, (
            f"lower bound {result.lower_bound} is above a partition of {best}"
        )
        if result.proved:
            assert value <= best + self.slack, f"proved {value}, but {best} is known"
            other = value if self.proved is None else self.proved
            assert abs(value - other) <= self.slack, f"proved {value}, and {other} before"
            self.proved = value
        if self.proved is not None:
            assert value >= self.proved - self.slack, f"{value} is below the optimum {self.proved}"
        self.best = best


def _limits(case: SearchCase) -> tuple[int, int]:
    if case.sizes == "equal":
        return case.heads // case.groups, case.heads // case.groups
    return (1, case.heads) if case.sizes == "free" else case.sizes


class SearchContestant(Contestant):
    """A method of ``gqa_kernels.grouping.search`` with its options."""

    def __init__(self, name: str, method: str, options: Mapping[str, Any]):
        self.name, self.method, self.options = name, method, options
        self.kind = "backend" if method in OURS else "peer"
        settings = "".join(f", {key}={value!r}" for key, value in options.items())
        self.summary = f"search(..., method={method!r}{settings})"

    def unavailable_reason(self, device: torch.device) -> str | None:
        if self.method == "nsga2" and importlib.util.find_spec("pymoo") is None:
            return "pymoo is not installed"
        return None

    def unsupported_reason(self, problem: SearchProblem) -> str | None:
        if self.method == "subset_dp" and problem.case.heads > MAX_HEADS:
            return f"at most {MAX_HEADS} heads"
        return None

    def prepare(self, problem: SearchProblem) -> Prepared:
        case = problem.case

        def run(copy: int) -> SearchResult:
            return search(problem.distances, case.groups, self.method, case.sizes, **self.options)

        return Prepared(run, facts=lambda result: _facts(problem, result))


def _facts(problem: SearchProblem, result: SearchResult) -> dict[str, Any]:
    return {
        "objective": result.objective,
        "lower_bound": result.lower_bound,
        "proved": result.proved,
        "random_objective": problem.random_objective,
    }


def search_backends() -> dict[str, Contestant]:
    """Our methods, by name."""
    ours = [c for c in _contestants() if c.method in OURS]
    return {c.name: c for c in sorted(ours, key=lambda c: OURS.index(c.method))}


def search_peers() -> dict[str, Contestant]:
    """The published methods, by name."""
    return {c.name: c for c in _contestants() if c.method not in OURS}


def _contestants() -> list[SearchContestant]:
    runs = {**RUNS, **EXACT}
    return [SearchContestant(name, method, options) for name, (method, options) in runs.items()]
