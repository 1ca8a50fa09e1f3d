"""The ops ``gqa_kernels::triton_varlen_forward`` and its backward: packed sequences with gradients.

The forward is the cache's, the backward that of dense tensors: its kernels find a sequence's rows
through the offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import autograd
from ...cache.view import KVView
from ..base import empty_gradients, empty_output_like
from .configs import device_facts
from .launch.backward import BackwardCall, run_backward, sinks_gradient
from .launch.forward import CacheCall, ForwardCall
from .ops import triton_cache_attention_forward


@torch.library.custom_op("gqa_kernels::triton_varlen_forward", mutates_args=())
def triton_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    value_head_map: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    max_q_len: int,
    max_kv_len: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    bshd: bool,
) -> tuple[Tensor, Tensor]:
    """Forward attention of ``B`` packed sequences.

    Args:
        q: ``[1, Hq, total_q, D]``; k and v as :class:`~gqa_kernels.cache.inputs.PackedKV` has them.
        plan, value_head_map: as ``triton_attention_forward`` takes them.
        alibi_slopes: ``[B, Hq]``.
        q_offsets, k_offsets: int32 ``[B + 1]``.

    Returns:
        out ``[1, Hq, total_q, Dv]`` and LSE fp32 ``[1, Hq, total_q]``.
    """
    view = KVView.packed(k, v, k_offsets)
    return triton_cache_attention_forward(
        q, view.k, view.v, plan, alibi_slopes, sinks, None, view.kv_lengths, None, view.kv_begin,
        q_offsets, max_q_len, max_kv_len, None, None, None, None, scale, window_left, window_right,
        softcap, bshd,
    )  # fmt: skip


@triton_varlen_forward.register_fake
def _(
    q, k, v, plan, value_head_map, alibi_slopes, sinks, q_offsets, k_offsets, max_q_len, max_kv_len,
    scale, window_left, window_right, softcap, bshd,
):  # fmt: skip
    return empty_output_like(q, v.shape[3], bshd), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gqa_kernels::triton_varlen_backward", mutates_args=())
def triton_varlen_backward(
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
    q_offsets: Tensor,
    k_offsets: Tensor,
    max_q_len: int,
    max_kv_len: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    need_slopes: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`triton_varlen_forward`; deterministic.

    Returns:
        dq, dk and dv in the shapes of q, k and v, zero at tokens of no sequence; dslopes fp32
        ``[B, Hq]`` and dsinks fp32 ``[Hq]``, empty where not needed.
    """
    batch = q_offsets.shape[0] - 1
    dq, dk, dv, dslopes, dsinks = empty_gradients(q, k, v, need_slopes, need_sinks, batch)
    for gradient in (dq, dk, dv):
        gradient.zero_()
    view = KVView.packed(k, v, k_offsets)
    cache = CacheCall(None, view.kv_begin, q_offsets, max_q_len, max_kv_len, None, None, None, None)
    forward = ForwardCall(
        q, view.k, view.v, plan, alibi_slopes, sinks, None, view.kv_lengths, scale, window_left,
        window_right, softcap, 0.0, None, out, lse, cache,
    )  # fmt: skip
    call = BackwardCall(
        forward, value_head_map is None, dout, dlse, torch.empty_like(lse), dq, dk, dv, None,
        need_sinks,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        slopes = run_backward(call, device_facts(q.device), need_slopes)
    dslopes = slopes if need_slopes else dslopes
    if need_sinks:
        # Tokens of no sequence have any LSE.
        token = torch.arange(lse.shape[2], device=lse.device)
        packed_lse = lse.masked_fill(token >= q_offsets[-1], -torch.inf)
        dsinks = sinks_gradient(sinks, packed_lse, call.delta)
    return dq, dk, dv, dslopes, dsinks


@triton_varlen_backward.register_fake
def _(
    dout, dlse, q, k, v, out, lse, plan, value_head_map, alibi_slopes, sinks, q_offsets, k_offsets,
    max_q_len, max_kv_len, scale, window_left, window_right, softcap, need_slopes, need_sinks,
):  # fmt: skip
    return empty_gradients(q, k, v, need_slopes, need_sinks, q_offsets.shape[0] - 1)


autograd.register(
    "gqa_kernels::triton_varlen_forward", "gqa_kernels::triton_varlen_backward", num_maps=2,
    has_dropout=False,
)  # fmt: skip
