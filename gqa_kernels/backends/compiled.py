"""The compiled ops as a backend runs them, on whatever device has kernels for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch._C import _get_deterministic_algorithms, _len_torch_dispatch_stack

from ..call.append import AppendCall
from ..call.attention import AttentionCall
from ..call.keep import KeepCall
from ..head_map import HeadMap
from ..native import build
from ..native.flops import enter_formulas
from ..native.schema import APPEND, DENSE_OUTPUT, FORWARD, KEEP, OUTPUT
from .base import Backend, Call, Runner

_NO_LSE = torch.empty(0)  # in place of one that nobody reads

_runners: dict[tuple, Runner] = {}  # by what they follow from
_append_runners: dict[tuple, Callable[[Callable[..., Any], AppendCall], Tensor]] = {}


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
        is_tensor = type(call.q) is Tensor
        keeps_lse = call.lse_wanted or not is_tensor  # DTensor has rules for that op
        on_cpu = is_tensor and call.q.is_cpu
        key = (call.kind, call.options.kind, call.bshd, keeps_lse, call.requires_grad, on_cpu)
        found = _runners.get(key)
        if found is None:
            found = _runners[key] = _runner(call, *key[-3:])
        return found

    def append(self, call: AppendCall) -> Tensor | None:
        op = torch.ops.gqa_kernels.cache_append.default
        if torch.compiler.is_compiling():
            call.check()
            q = op(*APPEND.arguments_of(call))
        else:
            key = (call.kv.kind, call.new_offsets is None, call.rotated_q is None,
                   call.rotary_cos is None, call.rotary_interleaved)  # fmt: skip
            found = _append_runners.get(key)
            if found is None:
                found = _append_runners[key] = APPEND.runner_like(call)
            try:
                q = found(op._op, call)
            except RuntimeError:
                call.check()
                raise
        return call.q if call.rotated_q is None else q

    def keep(self, call: KeepCall) -> None:
        torch.ops.gqa_kernels.cache_keep.default(*KEEP.arguments_of(call))


def _forward() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.ops.gqa_kernels.attention_forward.default


def _traced(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The op as torch.compile traces it."""
    call.check()
    return _forward()(*FORWARD.arguments_of(call))


def _runner(call: AttentionCall, keeps_lse: bool, requires_grad: bool, on_cpu: bool) -> Runner:
    """What runs calls of a kind. Time matters here: a call of a few keys takes 2 microseconds."""
    read_at_once = on_cpu and type(call.head_map) is HeadMap
    paths = {"head_map": "head_map.cpu_tensor"} if read_at_once else {}
    forward, run_forward = _forward(), FORWARD.runner_like(call, **paths)

    def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
        return _run(run_forward, forward, call)

    given = set(FORWARD.given(call))
    if keeps_lse or requires_grad or not given <= set(OUTPUT.names):
        return run
    is_short = given <= set(DENSE_OUTPUT.names)
    ops = torch.ops.gqa_kernels
    op = ops.attention_dense_output if is_short else ops.attention_output
    # Without OpOverload's __call__, a function of Python. These ops have no autograd to pass by.
    output: Callable[..., Tensor] = op.default._op
    run_output = (DENSE_OUTPUT if is_short else OUTPUT).runner_like(call, **paths)

    def run_without_lse(call: AttentionCall) -> tuple[Tensor, Tensor]:
        if _len_torch_dispatch_stack() or _get_deterministic_algorithms():
            return run(call)  # deterministic mode fills the op's memory, which the other does not
        try:
            return run_output(output, call), _NO_LSE
        except RuntimeError:
            call.check()
            raise

    return run_without_lse


def _run(run_op: Callable[..., Any], op: Callable[..., Any], call: Call) -> Any:
    """``run_op(op, call)``; past autograd (some 20 microseconds) if nothing needs it."""
    if _len_torch_dispatch_stack():
        enter_formulas()
    try:
        if call.requires_grad:
            return run_op(op, call)
        with _C._AutoDispatchBelowAutograd():
            return run_op(op, call)
    except RuntimeError:
        call.check()
        raise
