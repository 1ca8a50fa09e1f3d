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


@torch.library.register_fake("gqa_kernels::attention_backward")
def _(
    dout, dlse, q, k, v, out, lse, head_map, value_head_map, alibi_slopes, sinks, attn_mask,
    kv_lengths, scale, window_left, window_right, softcap, dropout_p, dropout_seed, need_slopes,
    need_sinks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(q, k, v, need_slopes, need_sinks)


autograd.register("gqa_kernels::attention_forward", "gqa_kernels::attention_backward", num_maps=2)
