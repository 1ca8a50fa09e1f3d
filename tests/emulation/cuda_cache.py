"""Attention over caches, as parameters of the CUDA phases."""

from __future__ import annotations

from types import SimpleNamespace

from gqa_kernels.call.attention import AttentionCall

from .cuda_harness import Call, make_call
from .cuda_params import DTYPES, Strides

NUMBERS = ("k_scale", "v_scale", "k_zero", "v_zero")


def make_cache_call(inputs: AttentionCall) -> Call:
    """What the host code passes to a phase for attention over a cache; outputs are full of NaN."""
    view = inputs.kv
    names = (
        "q", "dtype", "bshd", "value_head_dim", "head_map_tensor", "value_head_map_tensor",
        "scale", "options", "alibi_slopes", "sinks", "attn_mask",
    )  # fmt: skip
    dense = SimpleNamespace(
        k=view.k, v=view.v, kv=view, dropout_seed=None,
        **{x: getattr(inputs, x) for x in names},
    )  # fmt: skip
    call = make_call(
        dense, page_table=view.page_table, kv_begin=view.kv_begin, q_offsets=inputs.q_offsets,
        batch=view.batch, max_q_len=inputs.q_len,
    )  # fmt: skip
    call.params.k_dtype = call.params.v_dtype = DTYPES.index(view.k.dtype)
    call.params.value_head_dim = view.value_head_dim
    for name in NUMBERS:
        x = getattr(view, name)
        if x is not None:
            call.tensors[name] = x
            setattr(call.params, name, x.data_ptr())
            setattr(call.params, f"{name}_stride", Strides(*x.stride()))
    return call
