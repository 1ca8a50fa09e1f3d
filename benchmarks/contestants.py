"""What a contestant is: a backend of the package or a peer, made ready for one problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_kernels import asym_gqa_attention
from gqa_kernels.backends.dispatch import BACKENDS, explain_backend

from .problem import Problem


def unchanged(out: Any) -> Any:
    return out


@dataclass(frozen=True)
class Prepared:
    """A contestant ready to run.

    Attributes:
        run: what is timed; called with the index of the input copy.
        result: what the gate looks at, ``[B, Hq, Sq, D]``, from what ``run`` returned; not timed.
    """

    run: Callable[[int], Any]
    result: Callable[[Any], Tensor] = unchanged


class Contestant(ABC):
    """One way to compute a problem.

    Attributes:
        name: unique among the contestants of an op.
        kind: ``"backend"`` (ours) or ``"peer"``.
        summary: what it does, and what it is given outside the timing.
    """

    name: str
    kind: str = "peer"
    summary: str

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Why it can't run on this machine at all, or None."""
        return None

    def unsupported_reason(self, problem: Problem) -> str | None:
        """Why it can't run this problem, or None."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Prepared:
        """Make ready; nothing of it is timed."""


class BackendContestant(Contestant):
    """A backend of the package through the public function, Python overhead included."""

    kind = "backend"

    def __init__(self, name: str):
        self.name = name
        self.summary = f"asym_gqa_attention(..., backend={name!r})"

    def unavailable_reason(self, device: torch.device) -> str | None:
        backend = BACKENDS[self.name]
        if device.type not in backend.capabilities.devices:
            return f"does not run on device {device.type}"
        if self.name == "triton" and device.type == "cpu":
            return "runs in Triton's interpreter here, which is never timed"
        return backend.unavailable_reason()

    def unsupported_reason(self, problem: Problem) -> str | None:
        reasons = explain_backend(*problem.copies[0], problem.head_map, **problem.case.options)
        return "; ".join(reasons[self.name]) or None

    def prepare(self, problem: Problem) -> Prepared:
        head_map, options = problem.head_map, problem.case.options

        def run(copy: int) -> Tensor:
            q, k, v = problem.copies[copy]
            return asym_gqa_attention(q, k, v, head_map, backend=self.name, **options)

        return Prepared(run)


def backends() -> dict[str, Contestant]:
    """Every backend of the package, by name."""
    return {name: BackendContestant(name) for name in BACKENDS}
