"""The compiled ops as a backend runs them, on whatever device has kernels for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..call.append import AppendCall
from ..call.attention import AttentionCall
from ..call.keep import KeepCall
from ..native import build
from ..native.flops import enter_formulas
from ..native.schema import APPEND, FORWARD, KEEP
from .base import Backend, Call

_NO_LSE = torch.empty(0)  # in place of one that nobody reads

# FORWARD's arguments of a call, by its kind.
_arguments_of: dict[int, Callable[[AttentionCall], tuple]] = {}


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
        if torch.compiler.is_compiling():
            call.check()
            return _forward()(*FORWARD.arguments_of(call))
        kind = call.kind if call.kind >= 0 else call.find_kind()
        arguments_of = _arguments_of.get(kind)
        if arguments_of is None:
            arguments_of = _arguments_of[kind] = FORWARD.arguments_like(call)
        if (
            call.lse_wanted
            or call.requires_grad
            or type(call.q) is not Tensor  # DTensor has rules for this op
            or torch._C._get_deterministic_algorithms()  # which fills this op's memory
        ):
            return _run(_forward(), arguments_of(call), call)
        return _run(_output(), arguments_of(call), call), _NO_LSE

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


@lru_cache(maxsize=1)  # never compiled: looking it up in torch.ops takes longer
def _output() -> Callable[..., Tensor]:
    return torch.ops.gqa_kernels.attention_output.default


def _run(op: Callable[..., Any], arguments: tuple, call: Call) -> Any:
    """``op(*arguments)``; past autograd (some 20 microseconds) if nothing needs it."""
    if torch._C._len_torch_dispatch_stack():
        enter_formulas()
    try:
        if call.requires_grad:
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    except RuntimeError:
        call.check()
        raise
