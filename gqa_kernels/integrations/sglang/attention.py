"""Attention over SGLang's token pool, and what the layers of a step share.

This file needs no SGLang, only tensors in its layouts. Keys and values of one layer lie in
``[slots, Hkv, D]``. A request's tokens lie in the slots that its row of ``req_to_token`` names, in
runs of whole pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...cache.paged import PagedKVCache
from ...decode import asym_gqa_decode
from ..engine_layer import Layer


@dataclass(frozen=True)
class Step:
    """What the layers of a forward pass share.

    Attributes:
        page_table: int32 ``[requests, max_pages]``.
        seq_lens: int32 ``[requests]``, number of keys of each request, including new ones.
        query_offsets: int32 ``[requests + 1]``, where each request's new tokens begin; None if each
            has one.
        max_query_len: largest number of new tokens of a request.
        page_size: tokens of a page.
    """

    page_table: Tensor
    seq_lens: Tensor
    query_offsets: Tensor | None
    max_query_len: int
    page_size: int


def page_tables(req_to_token: Tensor, requests: Tensor, max_len: int, page_size: int) -> Tensor:
    """The pages of the requests' first ``max_len`` tokens, int32 ``[requests, pages]``.

    Args:
        req_to_token: int32 ``[rows, max_context]``, the slot of each token.
        requests: ``[requests]`` integers, the rows of ``req_to_token`` to use.
    """
    first_slots = req_to_token[:, :max_len:page_size][requests]
    return (first_slots // page_size).int()


def pooled_attention(
    layer: Layer,
    step: Step,
    query: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of new tokens over a pool that holds their keys and values: ``[tokens, Hq, Dv]``.

    Args:
        query: ``[tokens, Hq, D]``, requests packed one after another.
        k_pool, v_pool: ``[slots, Hkv, D]`` and ``[slots, Hkv, Dv]`` with any strides; they are read
            in place.
        k_scale, v_scale: the scales of an fp8 pool, fp32 of one element each.
    """
    cache = PagedKVCache(
        _pages(k_pool, step.page_size),
        _pages(v_pool, step.page_size),
        step.page_table,
        step.seq_lens,
        order="NHD",
        k_scale=k_scale,
        v_scale=v_scale,
    )
    options = {**layer.options(), "backend": backend}
    if step.query_offsets is None:
        out = asym_gqa_decode(query[:, None], cache, layer.head_map, layout="bshd", **options)
        return out[:, 0]
    return asym_gqa_decode(
        query,
        cache,
        layer.head_map,
        cu_seqlens_q=step.query_offsets,
        max_seqlen_q=step.max_query_len,
        **options,
    )


def _pages(pool: Tensor, page_size: int) -> Tensor:
    """``[slots, H, D]`` as ``[pages, page_size, H, D]``: a view."""
    pages = pool.shape[0] // page_size
    return pool[: pages * page_size].unflatten(0, (pages, page_size))
