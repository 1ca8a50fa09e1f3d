"""One attention layer of a vLLM batch: new tokens into its paged cache, then attention over it.

Needs no vLLM, only tensors in its layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.paged import PagedKVCache
from ...decode import asym_gqa_decode
from ..engine_layer import Layer


@dataclass(frozen=True)
class Batch:
    """What the layers of a step share, from vLLM's ``CommonAttentionMetadata``.

    Attributes:
        num_tokens: new tokens of all requests, padding of a CUDA graph included.
        max_query_len: most new tokens of a request.
        query_start_loc: int32 ``[num_requests + 1]``, where each request's new tokens begin.
        seq_lens: int32 ``[num_requests]``, keys of a request, the new ones included.
        old_lens: int32 ``[num_requests]``, those there were before.
        block_table: int32 ``[num_requests, max_blocks]``.
        causal: whether a token sees later ones.
    """

    num_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    old_lens: Tensor
    block_table: Tensor
    causal: bool


def cached_attention(
    layer: Layer,
    batch: Batch,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    kv_cache: Tensor,
    *,
    storage: torch.dtype | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append the new keys and values to the cache, then attend: ``[tokens, Hq, Dv]``.

    Args:
        query: ``[tokens, Hq, D]``, requests packed one after another.
        key, value: ``[tokens, Hkv, D]`` and ``[tokens, Hkv, Dv]``; None if the cache has them
            already.
        kv_cache: ``[num_blocks, Hkv, block_size, D + Dv]`` in any memory order: K and V of a token
            side by side.
        storage: type of the cache's elements if the tensor has another one (fp8 as bytes).
        k_scale, v_scale: one number each, of an fp8 cache.
    """
    if storage is not None and kv_cache.dtype != storage:
        kv_cache = kv_cache.view(storage)
    k_cache, v_cache = kv_cache.tensor_split([query.shape[-1]], dim=-1)
    append = key is not None and value is not None
    cache = PagedKVCache(
        k_cache,
        v_cache,
        batch.block_table,
        batch.old_lens if append else batch.seq_lens,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return asym_gqa_decode(
        query,
        cache,
        layer.head_map,
        k_new=key if append else None,
        v_new=value if append else None,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        **{**layer.options(), "causal": batch.causal},
        advance=False,  # lengths are vLLM's
        backend=backend,
    )
