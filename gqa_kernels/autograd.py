"""Autograd of the fused ops: a backward op for a forward op, with what is saved between them.

Forward ops take ``(q, k, v, *maps, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left,
window_right, softcap, bshd, dropout_p, dropout_seed)`` and return out and LSE, both differentiable.
Backward ops take ``(dout, dlse, q, k, v, out, lse, *maps, alibi_slopes, sinks, attn_mask,
kv_lengths, scale, window_left, window_right, softcap, dropout_p, dropout_seed, need_slopes,
need_sinks)`` and return dq, dk, dv, dslopes and dsinks. ``maps`` is a key and a value head map, or
one packed plan of both. Ops of packed sequences take their offsets in place of the mask and the
lengths, two more sizes before the scale, and no dropout. Nothing of the size ``Sq x Sk``, and no
expanded K or V, is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

NUM_BIASES = 4  # alibi_slopes, sinks, and attn_mask and kv_lengths or offsets of both sides


def register(forward_op: str, backward_op: str, num_maps: int, has_dropout: bool = True) -> None:
    """Make ``forward_op`` differentiable once by ``backward_op``.

    Args:
        forward_op, backward_op: qualified names, ``"gqa_kernels::..."``, of registered ops.
        num_maps: how many arguments their ``maps`` are.
        has_dropout: whether they have dropout's two arguments.
    """
    backward_call = _op(backward_op)
    biases = 3 + num_maps  # index of alibi_slopes
    options = biases + NUM_BIASES  # index of scale

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *scalars, _bshd = inputs[options : -2 if has_dropout else None]
        dropout = inputs[-2:] if has_dropout else ()
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:options], *dropout[1:])
        ctx.scalars = [*scalars, *dropout[:1]]
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # looked at once: activation checkpointing recomputes them
        tensors, seed = saved[: 2 + options], saved[2 + options :]
        out, lse = tensors[3:5]
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        if dout.stride(-1) != 1:  # the gradient of a sum is one element, expanded
            dout = dout.contiguous()
        if dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        need_slopes, need_sinks = ctx.needs_input_grad[biases : biases + 2]
        dq, dk, dv, dslopes, dsinks = backward_call(
            dout, dlse, *tensors, *ctx.scalars, *seed, need_slopes, need_sinks
        )
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        gradients[:3] = dq, dk, dv
        gradients[biases] = dslopes if need_slopes else None
        gradients[biases + 1] = dsinks if need_sinks else None
        return tuple(gradients)

    torch.library.register_autograd(forward_op, backward, setup_context=setup_context)
    torch.library.register_autograd(backward_op, _refuse, setup_context=_save_nothing)


def call(op: Callable[..., Any], requires_grad: bool, *arguments: Any) -> Any:
    """``op(*arguments)``; past autograd (some 20 microseconds) where nothing needs it."""
    if requires_grad or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation goes through one of the tensors. Ops with
    a registered backward refuse the first and drop the tangents of the second silently."""
    if torch.compiler.is_compiling():
        return False
    forward = torch.autograd.forward_ad._current_level >= 0
    if not forward and _functorch.maybe_current_level() is None:
        return False
    return any(_is_tracked(x, forward) for x in tensors if x is not None)


def _is_tracked(x: Tensor, forward: bool) -> bool:
    """Whether torch.func differentiates ``x``, or forward mode does; either may be below vmap."""
    while _functorch.is_batchedtensor(x):
        x = _functorch.get_unwrapped(x)
    if _functorch.is_gradtrackingtensor(x):
        return True
    return forward and torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is made of one of the tensors. Those inside of vmap say that
    they need no gradient, whatever is below."""
    if not torch.is_grad_enabled():
        return False
    mapped = not torch.compiler.is_compiling() and _functorch.maybe_current_level() is not None
    for x in tensors:
        while mapped and x is not None and _functorch.is_batchedtensor(x):
            x = _functorch.get_unwrapped(x)
        if x is not None and x.requires_grad:
            return True
    return False


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the type that autocast gives them, as SDPA's; fp64 stays."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def autocast_dtype(x: object) -> torch.dtype | None:
    """The type that autocast, where it is on for the tensor's device, gives to products."""
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _op(name: str) -> Callable[..., Any]:
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


def _save_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    """The second derivative is refused, whatever it would need."""


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "double backward through asym_gqa_attention is supported by backend='reference' only"
    )
