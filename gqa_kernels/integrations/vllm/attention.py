"""One attention layer of a vLLM batch: new tokens into its paged cache, then attention over it.

Needs no vLLM, only tensors in its layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...cache.paged import PagedKVCache
from ...decode import DecodePlan, plan_decode
from ..engine_layer import Layer
from .pages import Pages


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
        plans: the checked calls of this step. Layers with the same maps and options share one.
    """

    num_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    old_lens: Tensor
    block_table: Tensor
    causal: bool
    plans: dict[tuple, DecodePlan] = field(default_factory=dict, repr=False, compare=False)


def cached_attention(
    layer: Layer,
    pages: Pages,
    batch: Batch,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    kv_cache: Tensor,
    *,
    scales: dict[str, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append the new keys and values to the cache, then attend: ``[tokens, Hq, Dv]``.

    Args:
        pages: how ``kv_cache`` is laid out.
        query: ``[tokens, Hq, D]``, requests packed one after another.
        key, value: ``[tokens, H, D]`` and ``[tokens, H, Dv]``, the cache's heads first; None if the
            cache has them already.
        kv_cache: vLLM's memory of this layer, as :meth:`.pages.Pages.split` takes it.
        scales: ``k_scale`` and ``v_scale`` of an fp8 cache with one scale each.
    """
    k_heads, v_heads = layer.kv_heads
    k_cache, v_cache, inside = pages.split(kv_cache, (k_heads, v_heads))
    append = key is not None and value is not None
    lens = batch.old_lens if append else batch.seq_lens
    cache = PagedKVCache(k_cache, v_cache, batch.block_table, lens, **(scales or inside))
    identity = (*layer.identity, append, query.shape, query.dtype)
    plan = batch.plans.get(identity)
    if plan is None:
        plan = batch.plans[identity] = plan_decode(
            query,
            cache,
            layer.head_map,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            **{**layer.options(), "causal": batch.causal},
            backend=backend,
        )
    if not append:
        return plan(query, cache)
    return plan(query, cache, key[:, :k_heads], value[:, :v_heads])
