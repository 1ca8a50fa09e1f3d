"""vLLM's attention over its paged cache, by our functions, with one more argument: the head map.

Caches are ``[num_blocks, block_size, Hk, D]``; queries are packed ``[tokens, Hq, D]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels import HeadMap, PagedKVCache, asym_gqa_decode

from .eager import missing

MISSING = {
    ("unified_attention", "q_descale"): "queries are fp16, bf16 or fp32",
    ("unified_attention", "k_descale"): "a scale is one number, per head, or per token and head",
    ("unified_attention", "qq_bias"): "a mask covers all keys, this bias the new tokens' alone",
    (
        "paged_attention",
        "blocksparse_block_size",
    ): "no block is left out; a mask hides keys",
}
FORMATS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn,
           "fp8_e5m2": torch.float8_e5m2}  # fmt: skip


def refuse(function: str, name: str, value: object) -> None:
    raise missing(name, value, MISSING[function, name])


def paged_attention(
    query, key_cache, value_cache, num_kv_heads, scale, block_tables, seq_lens, block_size,
    max_seq_len, alibi_slopes=None, kv_cache_dtype="auto", k_scale=None, v_scale=None,
    blocksparse_block_size=None, *, head_map=None,
) -> Tensor:  # fmt: skip
    """Decode: one query token per sequence, ``[num_seqs, Hq, D]``."""
    if blocksparse_block_size is not None:
        refuse("paged_attention", "blocksparse_block_size", blocksparse_block_size)
    scales = {}
    if kv_cache_dtype != "auto":
        key_cache, value_cache = (x.view(FORMATS[kv_cache_dtype]) for x in (key_cache, value_cache))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    cache = PagedKVCache(key_cache, value_cache, block_tables, seq_lens, order="NHD", **scales)
    out = asym_gqa_decode(
        query[:, None], cache, head_map or HeadMap.uniform(query.shape[1], num_kv_heads),
        scale=scale, alibi_slopes=alibi_slopes, layout="bshd",
    )  # fmt: skip
    return out[:, 0]


def unified_attention(
    q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, softcap, q_descale=None, k_descale=None, v_descale=None,
    alibi_slopes=None, sinks=None, qq_bias=None, out=None, *, head_map=None,
) -> Tensor:  # fmt: skip
    """Prefill chunks and decode tokens of several sequences at once."""
    refused = (("q_descale", q_descale), ("qq_bias", qq_bias))
    for name, x in refused:
        if x is not None:
            refuse("unified_attention", name, "a tensor")
    scales = {}
    if k_descale is not None:
        if k_descale.dim() == 2:  # [num_seqs, Hk]
            refuse("unified_attention", "k_descale", tuple(k_descale.shape))
        scales = {"k_scale": k_descale, "v_scale": v_descale}
    cache = PagedKVCache(k, v, block_table, seqused_k, order="NHD", **scales)
    return asym_gqa_decode(
        q, cache, head_map or HeadMap.uniform(q.shape[1], k.shape[2]), cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q, scale=softmax_scale, causal=causal, window=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, out=out,
    )  # fmt: skip


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping) -> None:
    """Write tokens to slots of the whole cache."""
    table, lengths = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    cache = PagedKVCache(key_cache, value_cache, table, lengths, order="NHD")
    cache.write(key, value, slot_mapping)
