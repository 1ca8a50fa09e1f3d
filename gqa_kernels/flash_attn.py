"""FlashAttention 2's functions with one more argument, ``head_map``.

Import them from this module, and pass a map if the groups are uneven::

    out = flash_attn_func(q, k, v, causal=True, head_map=[0, 0, 0, 1, 2, 2])

Tensors are ``[B, S, H, D]``, a window side of -1 and a softcap of 0 mean none, and causality is
aligned to the bottom right, as in FlashAttention. Without ``head_map`` the groups are even. Every
backend of this package runs these functions; head dims and dtypes are those of
:func:`gqa_kernels.asym_gqa_attention`. What has no counterpart here is refused with a reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import asym_gqa_attention
from .cache.base import KVCache
from .cache.dense import DenseKVCache
from .cache.paged import PagedKVCache
from .call.checks import HeadMapLike
from .decode import asym_gqa_decode
from .head_map import HeadMap
from .native.arguments import check_tensors
from .varlen import asym_gqa_varlen_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    head_map: HeadMapLike | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of dense sequences, differentiable.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k, v: ``[B, Sk, Hkv, D]``, ``[B, Sk, Hkv, Dv]``.
        head_map: the KV head of each query head; default even groups.
        return_lse: return the LSE, fp32 ``[B, Hq, Sq]``, too.

    Returns:
        out ``[B, Sq, Hq, Dv]``, or ``(out, lse)``.

    Raises:
        ValueError, TypeError: as :func:`gqa_kernels.asym_gqa_attention`.
        NotImplementedError: ``return_attn_probs``.

    Examples:
        >>> import torch
        >>> from gqa_kernels.flash_attn import flash_attn_func
        >>> q, k, v = (torch.randn(2, 8, heads, 16) for heads in (3, 2, 2))
        >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0), head_map=[0, 0, 1]).shape
        torch.Size([2, 8, 3, 16])
    """
    _refuse_probabilities(return_attn_probs)
    return asym_gqa_attention(
        q, k, v, _map(head_map, q, k), dropout_p=dropout_p, scale=softmax_scale, causal=causal,
        window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, layout="bshd", return_lse=return_lse,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    head_map: HeadMapLike | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of packed sequences, differentiable without a block table.

    Args:
        q: ``[total_q, Hq, D]``.
        k, v: ``[total_k, Hkv, D]``; with ``block_table`` pages ``[P, page_size, Hkv, D]``.
        block_table: int32 ``[B, max_pages]``.
        head_map, return_lse: as for :func:`flash_attn_func`; the LSE is ``[Hq, total_q]``.

    Raises:
        ValueError, TypeError: as :func:`gqa_kernels.asym_gqa_varlen_attention`.
        NotImplementedError: dropout with ``block_table`` or off the CPU, or ``return_attn_probs``.

    Examples:
        >>> import torch
        >>> from gqa_kernels.flash_attn import flash_attn_varlen_func
        >>> offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> q, k, v = (torch.randn(12, heads, 16) for heads in (3, 2, 2))
        >>> flash_attn_varlen_func(q, k, v, offsets, offsets, 7, 7, head_map=[0, 0, 1]).shape
        torch.Size([12, 3, 16])
    """
    _refuse_probabilities(return_attn_probs)
    head_map = _map(head_map, q, k)
    options: dict[str, Any] = {
        "causal": causal, "scale": softmax_scale, "window": window_size, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "deterministic": deterministic, "return_lse": return_lse,
    }  # fmt: skip
    if block_table is None:
        return asym_gqa_varlen_attention(
            q, k, v, head_map, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p=dropout_p, **options,
        )  # fmt: skip
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0 with block_table, got {dropout_p}")
    check_tensors(cu_seqlens_k=cu_seqlens_k)
    cache = PagedKVCache(k, v, block_table, cu_seqlens_k.diff(), order="NHD")
    return asym_gqa_decode(
        q, cache, head_map, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, **options
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    head_map: HeadMapLike | None = None,
) -> Any:
    """Decode over a cache, into which new keys and values are written first.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k_cache, v_cache: ``[B_cache, capacity, Hkv, D]``, or pages ``[P, page_size, Hkv, D]`` with
            ``block_table``. Written in place.
        k, v: new keys and values ``[B, S, Hkv, D]``, ``S`` any number; with rotation, ``Sq``.
        rotary_cos, rotary_sin: ``[positions, R / 2]``: rotate q and k by their positions, counted
            from ``cache_seqlens`` as FlashAttention counts them: left padding included.
        cache_seqlens: ``[B]`` keys that the cache holds; not changed.
        num_splits: 0 or 1. How keys are split follows from shapes.
        head_map: as for :func:`flash_attn_func`.
        return_softmax_lse: return the LSE, fp32 ``[B, Hq, Sq]``, too.

    Raises:
        ValueError, TypeError: as :func:`gqa_kernels.asym_gqa_decode`.
        NotImplementedError: ``num_splits`` above 1; a batch index with a block table; rotation
            without causality or a window, where FlashAttention gives all queries one position;
            rotation with another number of new keys than queries.

    Examples:
        >>> import torch
        >>> from gqa_kernels.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(2, 1, 64, 2, 16)  # [B, S, Hkv, D] each
        >>> q, k, v = (torch.randn(1, 1, heads, 16) for heads in (3, 2, 2))
        >>> lengths = torch.tensor([0], dtype=torch.int32)
        >>> flash_attn_with_kvcache(
        ...     q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, head_map=[0, 0, 1]
        ... ).shape
        torch.Size([1, 1, 3, 16])
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if num_splits > 1:
        raise NotImplementedError(
            f"num_splits must be 0 or 1, since splits follow from shapes, got {num_splits}"
        )
    if block_table is not None and cache_batch_idx is not None:
        raise NotImplementedError(
            "cache_batch_idx must be None with a block_table, whose rows belong to sequences, got "
            "both"
        )
    batch, queries = q.shape[:2]
    if not isinstance(cache_seqlens, Tensor):
        filled = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), filled, dtype=torch.int32, device=q.device)
    head_map = _map(head_map, q, k_cache)
    cache = _cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    new: dict[str, Any] = {"k_new": k, "v_new": v}
    if rotary_cos is not None:
        rotates = causal or tuple(window_size) != (-1, -1)
        if not rotates or k is None or k.shape[1] != queries:
            raise NotImplementedError(
                "rotary_cos must come with causal or a window, and as many new keys as queries "
                f"({queries}), got causal {causal} and {0 if k is None else k.shape[1]} new keys"
            )
        new.update(
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved
        )
        if cache_leftpad is not None:
            steps = torch.arange(queries, device=q.device)
            new["rotary_positions"] = cache_seqlens[:, None] + steps
    elif k is not None and v is not None and k.shape[1] != queries:
        cache.append(k, v, layout="bshd")
        new = {}
    return asym_gqa_decode(
        q, cache, head_map, **new, scale=softmax_scale, causal=causal, window=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, layout="bshd", return_lse=return_softmax_lse,
    )  # fmt: skip


def _cache(
    k: Tensor, v: Tensor, seqlens: Tensor, batch_index: Tensor | None, leftpad: Tensor | None,
    block_table: Tensor | None,
) -> KVCache:  # fmt: skip
    """The caller's memory, with lengths of its own: without the padding, which theirs count."""
    lengths = seqlens.clone()
    if leftpad is not None:
        lengths -= leftpad
    if block_table is not None:
        return PagedKVCache(k, v, block_table, lengths, order="NHD", begin=leftpad)
    return DenseKVCache(k, v, lengths, batch_index=batch_index, begin=leftpad, layout="bshd")


def _map(head_map: HeadMapLike | None, q: Tensor, k: Tensor) -> HeadMapLike:
    """The given map, or even groups."""
    if head_map is not None:
        return head_map
    check_tensors(q=q, k=k)
    return HeadMap.uniform(q.shape[-2], k.shape[-2])


def _refuse_probabilities(return_attn_probs: bool) -> None:
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs must be False, since the probabilities are never stored, got True: "
            "return_lse=True returns the LSE"
        )
