"""The search op: methods that partition heads, as contestants on the same matrices.

Ours are those that prove their optimum and local search; the published ones are peers. How good a
method's partition is stands in its row beside its time: a fast method that leaves half the gain on
the table is no win. ``grouping_search.py`` runs the same methods on more and on real matrices.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from gqa_kernels.grouping import search
from gqa_kernels.grouping.objective import TOLERANCE, objective
from gqa_kernels.grouping.result import SearchResult, Sizes
from gqa_kernels.grouping.search.subset_dp import MAX_HEADS

from .contestants import Contestant, Prepared
from .grouping_instances import FAMILIES, instance
from .grouping_search import EXACT, OURS, RUNS, mean_random_objective


@dataclass(frozen=True)
class SearchCase:
    """One matrix to partition.

    Attributes:
        family: of ``grouping_instances.FAMILIES``.
        heads, groups: ``H`` and ``G``.
        rule: of the group sizes: ``free``, ``equal`` or ``LO..HI``.
    """

    family: str
    heads: int
    groups: int
    rule: str = "free"
    op: str = field(default="search", init=False)
    dtype: str = field(default="float64", init=False)
    cache: None = field(default=None, init=False)
    threads: None = field(default=None, init=False)

    @property
    def map(self) -> str:
        return f"{self.heads}:{self.groups}:{self.rule}"

    @property
    def key(self) -> str:
        return f"{self.op} {self.family} {self.map}"

    @property
    def facts(self) -> dict:
        """What a row says of the case."""
        return {
            "op": self.op, "model": self.family, "map": self.map, "dtype": self.dtype,
            "heads": self.heads, "groups": self.groups, "rule": self.rule,
        }  # fmt: skip

    @cached_property
    def sizes(self) -> Sizes:
        """The rule as ``search`` takes it."""
        match = re.fullmatch(r"(\d+)\.\.(\d+)", self.rule)
        return (int(match[1]), int(match[2])) if match else self.rule

    def check(self) -> None:
        """Raises ValueError where the rule can't be met."""
        if self.family not in FAMILIES:
            raise ValueError(f"family must be among {', '.join(FAMILIES)}, got {self.family!r}")
        search(np.zeros((self.heads, self.heads)), self.groups, "neighbour", self.sizes)


def parse_instance(text: str) -> SearchCase:
    """``FAMILY:HEADS:GROUPS[:RULE]``."""
    match = re.fullmatch(r"(\w+):(\d+):(\d+)(?::(free|equal|\d+\.\.\d+))?", text)
    if not match:
        raise ValueError(
            "shape of a search must be FAMILY:HEADS:GROUPS[:free|equal|LO..HI] with a family out "
            f"of {', '.join(FAMILIES)}, got {text!r}"
        )
    return SearchCase(match[1], int(match[2]), int(match[3]), match[4] or "free")


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
