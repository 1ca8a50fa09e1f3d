"""Fake kernels and autograd of the compiled ops. Imported once they exist."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd
from .backends.base import empty_gradients, empty_output_like


@torch.library.register_fake("gqa_kernels::attention_forward")
def _(
    q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
    window_left, window_right, softcap, bshd, dropout_p=0.0, dropout_seed=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = empty_output_like(q, v.shape[3], bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("gqa_kernels::plain_attention_forward")
def _(q, k, v, head_map, num_kv_heads, scale, causal, bshd) -> Tensor:
    return empty_output_like(q, v.shape[3], bshd)


@torch.library.register_fake("gqa_kernels::attention_backward")
def _(
    dout, dlse, q, k, v, out, lse, head_map, value_head_map, alibi_slopes, sinks, attn_mask,
    kv_lengths, scale, window_left, window_right, softcap, dropout_p, dropout_seed, need_slopes,
    need_sinks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(q, k, v, need_slopes, need_sinks)


@torch.library.register_fake("gqa_kernels::packed_attention_backward")
def _(
    dout, dlse, q, k, v, out, lse, head_map, value_head_map, alibi_slopes, sinks, kv_lengths,
    kv_begin, q_offsets, max_q_len, max_kv_len, scale, window_left, window_right, softcap,
    need_slopes, need_sinks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch = kv_begin.shape[0]
    return empty_gradients(q, k[:1], v[:1], need_slopes, need_sinks, batch)


autograd.register("gqa_kernels::attention_forward", "gqa_kernels::attention_backward", num_maps=2)


@torch.library.register_fake("gqa_kernels::cache_attention_forward")
def _(
    q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, page_table,
    kv_begin, q_offsets, max_q_len, k_scale, v_scale, k_zero, v_zero, scale, window_left,
    window_right, softcap, bshd, lse_wanted=True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value_head_dim = v.shape[3] * (2 if v.dtype == torch.uint8 else 1)  # int4: two in a byte
    out = empty_output_like(q, value_head_dim, bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("gqa_kernels::cache_append")
def _(
    q, k_new, v_new, k, v, kv_lengths, page_table, kv_begin, new_offsets, k_scale, v_scale,
    k_zero, v_zero, rotary_cos, rotary_sin, rotary_interleaved,
) -> Tensor:  # fmt: skip
    return k_new.new_empty(0) if q is None else torch.empty_like(q)
