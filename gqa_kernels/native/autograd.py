"""Autograd of the ops: connects each forward op with its backward op, and saves what that needs.

The arguments of both are found by name, in their schemas (:mod:`.schema`). Out and LSE are both
differentiable. Nothing of the size ``Sq x Sk``, and no expanded K or V, is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from .flops import enter_formulas
from .schema import Schema

RESULTS = ("out", "lse")


def register(forward_op: str, backward_op: str, forward: Schema, backward: Schema) -> None:
    """Make ``forward_op`` differentiable, once, with ``backward_op`` as its gradient.

    Args:
        forward_op, backward_op: qualified names, ``"gqa_kernels::..."``, of registered ops.
        forward, backward: their schemas. Beyond the forward's arguments the backward has ``dout``,
            ``dlse``, the forward's results, ``need_slopes`` and ``need_sinks``.
    """
    backward_call = _op(backward_op)
    made = ("dout", "dlse", "need_slopes", "need_sinks")
    tensors = [name for name in backward.tensors if name not in made]
    others = [name for name in backward.names if name not in (*backward.tensors, *made)]

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        call = forward.Arguments(*inputs)
        known = {**call._asdict(), **dict(zip(RESULTS, output, strict=True))}
        ctx.save_for_backward(*(known[name] for name in tensors))
        ctx.others = {name: known[name] for name in others}
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)

    def backward_of(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        # Read only once: under activation checkpointing, each read recomputes them.
        saved = dict(zip(tensors, ctx.saved_tensors, strict=True))
        out, lse = saved["out"], saved["lse"]
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        if dout.stride(-1) != 1:  # the gradient of a sum is one element, expanded
            dout = dout.contiguous()
        if dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        needs = dict(zip(forward.names, ctx.needs_input_grad, strict=False))
        need_slopes, need_sinks = needs.get("alibi_slopes", False), needs.get("sinks", False)
        call = backward.Arguments(
            dout=dout, dlse=dlse, need_slopes=need_slopes, need_sinks=need_sinks, **saved,
            **ctx.others,
        )  # fmt: skip
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            enter_formulas()
        dq, dk, dv, dslopes, dsinks = backward_call(*call)
        gradients = {"q": dq, "k": dk, "v": dv}
        if need_slopes:
            gradients["alibi_slopes"] = dslopes
        if need_sinks:
            gradients["sinks"] = dsinks
        return tuple(gradients.get(name) for name in forward.names[: ctx.num_inputs])

    torch.library.register_autograd(forward_op, backward_of, setup_context=setup_context)
    torch.library.register_autograd(backward_op, _refuse, setup_context=_save_nothing)


def is_transformed_now() -> bool:
    """Whether torch.func or forward-mode differentiation is active, for any tensor."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation involves one of the tensors. Ops with a
    registered backward raise an error under the first, and silently drop the tangents of the
    second."""
    if torch.compiler.is_compiling():
        return False
    forward = torch.autograd.forward_ad._current_level >= 0
    if not forward and _functorch.maybe_current_level() is None:
        return False
    return any(_is_tracked(x, forward) for x in tensors if x is not None)


def _is_tracked(x: Tensor, forward: bool) -> bool:
    """Whether torch.func or forward mode differentiates ``x``, perhaps below a vmap."""
    while _functorch.is_batchedtensor(x):
        x = _functorch.get_unwrapped(x)
    if _functorch.is_gradtrackingtensor(x):
        return True
    return forward and torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on one of the tensors. A tensor inside vmap reports that
    it needs no gradient even if the tensor below does."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    if torch.compiler.is_compiling() or _functorch.maybe_current_level() is None:
        return False
    return any(x is not None and _unwrapped(x).requires_grad for x in tensors)


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor that a vmap tensor wraps."""
    while _functorch.is_batchedtensor(x):
        x = _functorch.get_unwrapped(x)
    return x


is_autocast_on = torch._C._is_any_autocast_enabled  # for any device


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's type, as SDPA converts them; fp64 is not converted."""
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (
            x.to(dtype)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            else x
            for x in (q, k, v)
        )
    return q, k, v


def autocast_dtype(x: object) -> torch.dtype | None:
    """The type of matrix products under autocast, if autocast is on for the tensor's device."""
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _op(name: str) -> Callable[..., Any]:
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


def _save_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Refuse a second derivative."""


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "double backward through asym_gqa_attention is supported by backend='reference' only"
    )
