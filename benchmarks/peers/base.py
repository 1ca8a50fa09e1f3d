"""What a contestant is: a backend of the package or a peer, prepared for one problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from gqa_kernels import HeadMap, asym_gqa_attention, explain_backend, merge_attention_states
from gqa_kernels.backends.dispatch import BACKENDS

from ..data.cases import Case
from ..ops.attention import Problem

Inputs = tuple[Tensor, Tensor, Tensor]  # q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D]

UNEVEN = "the map is not equal, contiguous groups"
INTERPRETED = "runs in Triton's interpreter here, which is never timed"


def unchanged(out: Any) -> Any:
    return out


def no_facts(out: Any) -> Mapping[str, Any]:
    return {}


class ProblemWithTensors(Protocol):
    """An attention problem, over tensors or over a cache, of which every copy has plain tensors."""

    @property
    def case(self) -> Case: ...

    @property
    def tensors(self) -> list[Inputs]: ...


@dataclass(frozen=True)
class Prepared:
    """A contestant ready to run.

    Attributes:
        run: what is timed; called with the index of the input copy.
        result: what the gate looks at, from what ``run`` returned; not timed.
        facts: what a row is to say beside the time, from what ``run`` returned.
        stored: K and V ``[B, Hkv, Sk, D]`` that a quantised cache of the contestant's own
            represents: the gate compares with attention over them. None: over the problem's.
    """

    run: Callable[[int], Any]
    result: Callable[[Any], Any] = unchanged
    facts: Callable[[Any], Mapping[str, Any]] = no_facts
    stored: tuple[Tensor, Tensor] | None = None


class Contestant(ABC):
    """One way to compute a problem.

    Attributes:
        name: unique among the contestants of an op.
        kind: ``"backend"`` (ours), ``"peer"``, or ``"control"`` (ours on something easier).
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
        """Prepare the inputs. This is not timed."""

    def control(self) -> Contestant | None:
        """What is to be timed beside it on something easier, if anything."""
        return None


class StoringPeer(Contestant):
    """A peer for equal groups that keeps K and V in memory of its own. It competes both over
    tensors and over caches, which it fills outside the timing."""

    @abstractmethod
    def refusal(self, case: Case) -> str | None:
        """Why it can't run a case of equal groups, or None."""

    @abstractmethod
    def store(self, case: Case, inputs: list[Inputs]) -> Prepared:
        """Prepare every copy of the inputs."""

    def unsupported_reason(self, problem: ProblemWithTensors) -> str | None:
        case = problem.case
        if not case.head_map.is_uniform:
            return UNEVEN
        return "the heads have budgets" if case.cache_kind.budgets else self.refusal(case)

    def prepare(self, problem: ProblemWithTensors) -> Prepared:
        return self.store(problem.case, problem.tensors)


class BackendContestant(Contestant):
    """A backend of the package through the public function, Python overhead included."""

    kind = "backend"

    def __init__(self, name: str):
        self.name = self.backend = name
        self.summary = f"asym_gqa_attention(..., backend={name!r})"

    def unavailable_reason(self, device: torch.device) -> str | None:
        backend = BACKENDS[self.backend]
        if device.type not in backend.capabilities.devices:
            return f"does not run on device {device.type}"
        if self.backend == "triton" and device.type == "cpu":
            return INTERPRETED
        return backend.unavailable_reason()

    def unsupported_reason(self, problem: Problem) -> str | None:
        reasons = explain_backend(
            asym_gqa_attention, *problem.copies[0], problem.head_map, **problem.options
        )
        return "; ".join(reasons[self.backend]) or None

    def prepare(self, problem: Problem) -> Prepared:
        return Prepared(self._call(problem, problem.head_map))

    def _call(self, problem: Problem, head_map: HeadMap) -> Callable[[int], Tensor]:
        options, splits = problem.options, problem.case.splits

        def run(copy: int) -> Tensor:
            q, k, v = problem.copies[copy]
            if splits is not None:
                return attention_in_splits(q, k, v, head_map, self.backend, splits, options)
            return asym_gqa_attention(q, k, v, head_map, backend=self.backend, **options)

        return run

    def control(self) -> Contestant | None:
        return EvenControl(self.backend)


def no_even_map(head_map: HeadMap) -> str | None:
    """Why there is no map of equal groups to compare a map with, or None."""
    if head_map.is_uniform:
        return "the map is even"
    if head_map.num_heads % head_map.num_kv_heads:
        return "the heads don't divide into equal groups"
    return None


class EvenControl(BackendContestant):
    """A backend on the same tensors with equal groups: what the unevenness of a map costs."""

    kind = "control"

    def __init__(self, backend: str):
        super().__init__(backend)
        self.name = f"{backend}, even map"
        self.summary += ", on equal groups of the same tensors"

    def unsupported_reason(self, problem: Problem) -> str | None:
        return no_even_map(problem.head_map) or super().unsupported_reason(problem)

    def prepare(self, problem: Problem) -> Prepared:
        head_map = problem.head_map
        even = HeadMap.uniform(head_map.num_heads, head_map.num_kv_heads)
        on_the_map = self._call(problem, head_map)  # the gate knows that result only
        return Prepared(self._call(problem, even), lambda _: on_the_map(0))

    def control(self) -> None:
        return None


def backends() -> dict[str, Contestant]:
    """Every backend of the package, by name."""
    return {name: BackendContestant(name) for name in BACKENDS}


def attention_in_splits(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMap, backend: str, splits: int, options: dict
) -> Tensor:
    """Attention with the keys cut into a given number of parts.

    Triton's kernel takes the number. Other backends choose it themselves (the CPU's by the number
    of threads), so there each part is a call, and ``merge_attention_states`` puts them together.
    """
    if backend == "triton":
        with _triton_splits(splits):
            return asym_gqa_attention(q, k, v, head_map, backend=backend, **options)
    out = lse = None
    for k_part, v_part in zip(k.chunk(splits, 2), v.chunk(splits, 2), strict=True):
        part = asym_gqa_attention(
            q, k_part, v_part, head_map, backend=backend, return_lse=True, **options
        )
        out, lse = part if out is None else merge_attention_states(out, lse, *part)
    return out


@contextmanager
def _triton_splits(splits: int) -> Iterator[None]:
    """Within, Triton's decode launches have this number of splits."""
    from gqa_kernels.backends.triton.launch import forward as launch

    own = launch.decode_config
    launch.decode_config = partial(own, num_splits=splits)
    try:
        yield
    finally:
        launch.decode_config = own
