"""Fake kernels of the compiled ops, for ``torch.compile`` and export. Imported once they exist."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.base import empty_output_like


@torch.library.register_fake("gqa_kernels::attention_forward")
def _(
    q, k, v, head_map, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale,
    window_left, window_right, softcap, bshd,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = empty_output_like(q, v.shape[3], bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
