"""Attention of packed sequences with gradients, by the compiled kernels.

The forward is the cache kernel's, over the packed memory as it lies. The CPU's backward hands each
sequence's tokens, as views, to the dense backward op, which spreads it over the threads; on CUDA
one call does all, and finds the sequences in their offsets on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd
from ..cache.view import KVView
from .base import empty_gradients, empty_output_like


@torch.library.custom_op("gqa_kernels::varlen_attention_forward", mutates_args=())
def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: Tensor,
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
        alibi_slopes: ``[B, Hq]``.
        q_offsets, k_offsets: int32 ``[B + 1]``.

    Returns:
        out ``[1, Hq, total_q, Dv]`` and LSE fp32 ``[1, Hq, total_q]``.
    """
    view = KVView.packed(k, v, k_offsets)
    return torch.ops.gqa_kernels.cache_attention_forward.default(
        q, view.k, view.v, head_map, value_head_map, alibi_slopes, sinks, None, view.kv_lengths,
        None, view.kv_begin, q_offsets, max_q_len, None, None, None, None, scale, window_left,
        window_right, softcap, bshd,
    )  # fmt: skip


@varlen_attention_forward.register_fake
def _(
    q, k, v, head_map, value_head_map, alibi_slopes, sinks, q_offsets, k_offsets, max_q_len,
    max_kv_len, scale, window_left, window_right, softcap, bshd,
):  # fmt: skip
    return empty_output_like(q, v.shape[3], bshd), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gqa_kernels::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    head_map: Tensor,
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
    """Gradients of :func:`varlen_attention_forward`; deterministic.

    Returns:
        dq, dk and dv in the shapes of q, k and v, zero at tokens of no sequence; dslopes fp32
        ``[B, Hq]`` and dsinks fp32 ``[Hq]``, empty where not needed.
    """
    batch = q_offsets.shape[0] - 1
    found = empty_gradients(q, k, v, need_slopes, need_sinks, batch)
    dq, dk, dv, dslopes, dsinks = (x.zero_() for x in found)
    q_stops, k_stops = q_offsets.tolist(), k_offsets.tolist()
    for b in range(batch):
        rows, keys = slice(*q_stops[b : b + 2]), slice(*k_stops[b : b + 2])
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        gradients = torch.ops.gqa_kernels.attention_backward.default(
            dout[:, :, rows], None if dlse is None else dlse[:, :, rows].contiguous(),
            q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
            lse[:, :, rows].contiguous(), head_map, value_head_map,
            None if alibi_slopes is None else alibi_slopes[b : b + 1], sinks, None, None, scale,
            window_left, window_right, softcap, 0.0, None, need_slopes, need_sinks,
        )  # fmt: skip
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = gradients[:3]
        if need_slopes:
            dslopes[b] = gradients[3][0]
        if need_sinks:
            dsinks += gradients[4]
    return dq, dk, dv, dslopes, dsinks


@varlen_attention_backward.register_kernel("cuda")
def _(
    dout, dlse, q, k, v, out, lse, head_map, value_head_map, alibi_slopes, sinks, q_offsets,
    k_offsets, max_q_len, max_kv_len, scale, window_left, window_right, softcap, need_slopes,
    need_sinks,
):  # fmt: skip
    view = KVView.packed(k, v, k_offsets)
    return torch.ops.gqa_kernels.packed_attention_backward.default(
        dout, dlse, q, view.k, view.v, out, lse, head_map, value_head_map, alibi_slopes, sinks,
        view.kv_lengths, view.kv_begin, q_offsets, max_q_len, max_kv_len, scale, window_left,
        window_right, softcap, need_slopes, need_sinks,
    )  # fmt: skip


@varlen_attention_backward.register_fake
def _(
    dout, dlse, q, k, v, out, lse, head_map, value_head_map, alibi_slopes, sinks, q_offsets,
    k_offsets, max_q_len, max_kv_len, scale, window_left, window_right, softcap, need_slopes,
    need_sinks,
):  # fmt: skip
    return empty_gradients(q, k, v, need_slopes, need_sinks, q_offsets.shape[0] - 1)


autograd.register(
    "gqa_kernels::varlen_attention_forward", "gqa_kernels::varlen_attention_backward", num_maps=2,
    has_dropout=False,
)  # fmt: skip
