"""The op ``gqa_kernels::triton_attention_backward``, and the autograd of the forward op by it."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import autograd
from ..base import empty_gradients
from . import ops  # noqa: F401  (the forward op, and the interpreter's mend)
from .configs import device_facts
from .launch.backward import BackwardCall, run_backward, sinks_gradient
from .launch.forward import ForwardCall


@torch.library.custom_op("gqa_kernels::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    value_head_map: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_slopes: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`triton_attention_forward`; deterministic.

    Args:
        dout: ``[B, Hq, Sq, Dv]``.
        dlse: fp32 ``[B, Hq, Sq]``, contiguous, or None for zeros.
        out, lse: what the forward gave.
        others: as the forward took them.

    Returns:
        dq, dk and dv in the types and shapes of q, k and v; dslopes fp32 ``[B, Hq]`` and dsinks
        fp32 ``[Hq]``, empty where not needed.
    """
    dq, dk, dv, dslopes, dsinks = empty_gradients(q, k, v, need_slopes, need_sinks)
    forward = ForwardCall(
        q, k, v, plan, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left, window_right,
        softcap, dropout_p, dropout_seed, out, lse,
    )  # fmt: skip
    call = BackwardCall(
        forward, value_head_map is None, dout, dlse, torch.empty_like(lse), dq, dk, dv, None,
        need_sinks,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        slopes = run_backward(call, device_facts(q.device), need_slopes)
    dslopes = slopes if need_slopes else dslopes
    dsinks = sinks_gradient(sinks, lse, call.delta) if need_sinks else dsinks
    return dq, dk, dv, dslopes, dsinks


@triton_attention_backward.register_fake
def _(
    dout, dlse, q, k, v, out, lse, plan, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths,
    scale, window_left, window_right, softcap, dropout_p, dropout_seed, need_slopes, need_sinks,
):  # fmt: skip
    return empty_gradients(q, k, v, need_slopes, need_sinks)


autograd.register(
    "gqa_kernels::triton_attention_forward", "gqa_kernels::triton_attention_backward", num_maps=2
)
