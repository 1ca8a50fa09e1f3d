"""Attention over caches, as parameters of the CUDA phases."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gqa_kernels.call.attention import AttentionCall

from .cuda_harness import Call, make_call
from .cuda_params import DTYPES, Strides

NEVER = 1 << 20  # a page id that is not in storage
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


def paged(
    inputs: AttentionCall, page_size: int, lengths: list[int], packed: bool = True, **more: object
) -> Call:
    """The call with K and V in shuffled pages; NaN in unused slots, garbage in unused entries.

    Args:
        packed: K and V of a token lie together, else in pools with other strides.
        more: of :func:`make_call`.
    """
    heads = inputs.k.shape[1]
    batch, pages = len(lengths), -(-inputs.k.shape[2] // page_size)
    ids = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(3))
    table = ids[: batch * pages].view(batch, pages).to(torch.int32)
    dims = [inputs.head_dim, inputs.value_head_dim]
    shape = (len(ids), page_size, heads)
    if packed:
        pool = torch.full((*shape, sum(dims)), torch.nan, dtype=inputs.dtype).transpose(1, 2)
        pools = [pool[..., : dims[0]], pool[..., dims[0] :]]
    else:
        k = torch.full((*shape, dims[0]), torch.nan, dtype=inputs.dtype).transpose(1, 2)
        v = k.new_full((len(ids), heads, page_size, dims[1]), torch.nan)
        pools = [k, v]
    for b, length in enumerate(lengths):
        for pool, x in zip(pools, (inputs.k, inputs.v), strict=True):
            for s in range(length):
                pool[table[b, s // page_size], :, s % page_size] = x[b, :, s]
        table[b, -(-length // page_size) :] = NEVER
    table = table[:, None].expand(batch, heads, pages).contiguous()
    return make_call(inputs.replace(k=pools[0], v=pools[1]), page_table=table, batch=batch, **more)
