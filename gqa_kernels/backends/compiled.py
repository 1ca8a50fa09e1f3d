"""The compiled ops as a backend runs them, on whatever device has kernels for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor

from ..call.append import AppendCall
from ..call.attention import AttentionCall
from ..call.keep import KeepCall
from ..native import build
from ..native.flops import enter_formulas
from ..native.schema import APPEND, FORWARD, KEEP
from .base import Backend, Call, Runner

_NO_LSE = torch.empty(0)  # in place of one that nobody reads

_runners: dict[tuple, Runner] = {}  # by what they follow from


class CompiledBackend(Backend):
    """Torch's dispatcher takes the kernels of q's device.

    The ops check whatever memory safety needs. They may refuse a call whose tensors nobody has
    checked yet; what :meth:`~gqa_kernels.call.attention.AttentionCall.check` finds is then the
    error.
    """

    part: str  # of the compiled library

    def prepare(self) -> str | None:
        try:
            build.load(self.part)
        except RuntimeError as error:
            return str(error)
        return None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return self.runner(call)(call)

    def runner(self, call: AttentionCall) -> Runner:
        if torch.compiler.is_compiling():
            return _traced
        keeps_lse = call.lse_wanted or type(call.q) is not Tensor  # DTensor has rules for that op
        key = (call.kind, call.options.kind, call.bshd, keeps_lse, call.requires_grad)
        found = _runners.get(key)
        if found is None:
            found = _runners[key] = _runner(FORWARD.arguments_like(call), *key[-2:])
        return found

    def append(self, call: AppendCall) -> Tensor | None:
        op, arguments = torch.ops.gqa_kernels.cache_append.default, APPEND.arguments_of(call)
        if torch.compiler.is_compiling():
            call.check()
            q = op(*arguments)
        else:
            q = _run(op, arguments, call)
        return call.q if call.rotated_q is None else q

    def keep(self, call: KeepCall) -> None:
        torch.ops.gqa_kernels.cache_keep.default(*KEEP.arguments_of(call))


def _forward() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.ops.gqa_kernels.attention_forward.default


def _traced(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The op as torch.compile traces it."""
    call.check()
    return _forward()(*FORWARD.arguments_of(call))


def _runner(
    arguments_of: Callable[[AttentionCall], tuple], keeps_lse: bool, requires_grad: bool
) -> Runner:
    """What runs calls of a kind. Time matters here: a call of a few keys takes 2 microseconds."""
    forward = _forward()

    def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
        return _run(forward, arguments_of(call), call)

    if keeps_lse or requires_grad:
        return run
    # Without OpOverload's __call__, a function of Python.
    output: Callable[..., Tensor] = torch.ops.gqa_kernels.attention_output.default._op

    def run_without_lse(call: AttentionCall) -> tuple[Tensor, Tensor]:
        if _C._len_torch_dispatch_stack() or _C._get_deterministic_algorithms():
            return run(call)  # deterministic mode fills the op's memory, which the other does not
        try:
            with _C._AutoDispatchBelowAutograd():
                return output(*arguments_of(call)), _NO_LSE
        except RuntimeError:
            call.check()
            raise

    return run_without_lse


def _run(op: Callable[..., Any], arguments: tuple, call: Call) -> Any:
    """``op(*arguments)``; past autograd (some 20 microseconds) if nothing needs it."""
    if _C._len_torch_dispatch_stack():
        enter_formulas()
    try:
        if call.requires_grad:
            return op(*arguments)
        with _C._AutoDispatchBelowAutograd():
            return op(*arguments)
    except RuntimeError:
        call.check()
        raise
