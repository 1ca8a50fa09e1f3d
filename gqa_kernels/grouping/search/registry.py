"""Every search method by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """The result of a method.

    Attributes:
        labels: ``[H]`` group of each head, in any numbering; exactly ``num_groups`` groups, sizes
            within the problem's limits.
        lower_bound: no feasible partition costs less; 0 if the method has no better one.
    """

    labels: np.ndarray
    lower_bound: float = 0.0


@dataclass(frozen=True)
class Method:
    """One search method.

    Attributes:
        name: what ``search(method=...)`` takes.
        summary: one line for tables and help.
        solve: ``solve(problem: Problem, **options) -> Found``; the arguments after the problem are
            the method's options.
        solve_all: optional ``solve_all(problems, **options) -> list[Found]`` over problems that
            differ in ``num_groups`` and size limits only, cheaper than one by one.
    """

    name: str
    summary: str
    solve: Callable[..., Found]
    solve_all: Callable[..., list[Found]] | None = None

    def check_options(self, options: dict) -> None:
        """Raise TypeError for an option the method does not have, or lacks."""
        parameters = list(inspect.signature(self.solve).parameters.values())[1:]
        names = [p.name for p in parameters]
        for name in options:
            if name not in names:
                raise TypeError(
                    f"options of method {self.name!r} must be among {names}, got {name!r}"
                )
        for p in parameters:
            if p.default is p.empty and p.name not in options:
                raise TypeError(f"method {self.name!r} must be given {p.name}=, got none")
