"""FlashAttention 2's functions over ours, with one more argument: the head map.

Tensors are ``[B, S, H, D]``; a window side or softcap of -1 and 0 is off; causality is aligned to
the bottom right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
)

from .eager import missing

# (function, argument): why our functions can't express it.
MISSING = {
    ("flash_attn_func", "return_attn_probs"): "P is never kept; the LSE is return_lse",
    ("flash_attn_varlen_func", "dropout_p"): "packed sequences have no dropout",
    ("flash_attn_varlen_func", "return_attn_probs"): "P is never kept; the LSE is return_lse",
    ("flash_attn_with_kvcache", "num_splits"): "splits follow from shapes",
    ("flash_attn_with_kvcache", "k"): "as many new keys as queries",
    ("flash_attn_with_kvcache", "rotary_cos"): "with cache_leftpad positions count from the first "
    "key, and without causality each query has its own",
    ("flash_attn_with_kvcache", "cache_batch_idx"): "pages belong to sequences through block_table",
}


def refuse(function: str, name: str, value: object) -> None:
    raise missing(name, value, MISSING[function, name])


def uniform(q: Tensor, k: Tensor, head_axis: int) -> HeadMap:
    return HeadMap.uniform(q.shape[head_axis], k.shape[head_axis])


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, *, head_map=None,
    return_lse=False,
):  # fmt: skip
    if return_attn_probs:
        refuse("flash_attn_func", "return_attn_probs", return_attn_probs)
    return asym_gqa_attention(
        q, k, v, head_map or uniform(q, k, 2), dropout_p=dropout_p, scale=softmax_scale,
        causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, layout="bshd", return_lse=return_lse,
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None, *, head_map=None,
):  # fmt: skip
    if dropout_p:
        refuse("flash_attn_varlen_func", "dropout_p", dropout_p)
    if return_attn_probs:
        refuse("flash_attn_varlen_func", "return_attn_probs", return_attn_probs)
    options = {"causal": causal, "scale": softmax_scale, "window": window_size,
               "softcap": softcap, "alibi_slopes": alibi_slopes,
               "deterministic": deterministic}  # fmt: skip
    if block_table is not None:  # K and V in pages [P, page_size, H, D]
        cache = PagedKVCache(k, v, block_table, cu_seqlens_k.diff(), order="NHD")
        head_map = head_map or uniform(q, k, -2)
        return asym_gqa_decode(q, cache, head_map, cu_seqlens_q=cu_seqlens_q,
                               max_seqlen_q=max_seqlen_q, **options)  # fmt: skip
    return asym_gqa_varlen_attention(
        q, k, v, head_map or uniform(q, k, 1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, **options,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False, *, head_map=None,
):  # fmt: skip
    name = "flash_attn_with_kvcache"
    if num_splits > 1:
        refuse(name, "num_splits", num_splits)
    if k is not None and k.shape[1] != q.shape[1]:
        refuse(name, "k", tuple(k.shape))
    if rotary_cos is not None and (cache_leftpad is not None or not causal):
        refuse(name, "rotary_cos", tuple(rotary_cos.shape))
    if block_table is not None and cache_batch_idx is not None:
        refuse(name, "cache_batch_idx", cache_batch_idx.tolist())
    batch = q.shape[0]
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        filled = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), filled, dtype=torch.int32)
    lengths = cache_seqlens.clone()  # theirs stay as they are
    if cache_leftpad is not None:
        lengths -= cache_leftpad  # theirs count the padding
    if block_table is not None:
        cache = PagedKVCache(
            k_cache, v_cache, block_table, lengths, order="NHD", begin=cache_leftpad
        )
    else:
        cache = DenseKVCache(k_cache, v_cache, lengths, batch_index=cache_batch_idx,
                             begin=cache_leftpad, layout="bshd")  # fmt: skip
    return asym_gqa_decode(
        q, cache, head_map or uniform(q, k_cache, -2), k_new=k, v_new=v, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved if k is not None else False,
        scale=softmax_scale, causal=causal, window=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, layout="bshd", return_lse=return_softmax_lse,
    )  # fmt: skip
