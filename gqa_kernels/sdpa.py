"""``torch.nn.functional.scaled_dot_product_attention`` with one more argument, ``head_map``::

    out = scaled_dot_product_attention(query, key, value, is_causal=True, head_map=[0, 0, 1])

Causality is aligned to the top left, and dims before the heads broadcast, as in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import asym_gqa_attention
from .call.checks import HeadMapLike
from .head_map import HeadMap
from .native.arguments import check_tensors

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    head_map: HeadMapLike | None = None,
) -> Tensor:
    """Attention of dense sequences, differentiable.

    Args:
        query: ``[B, Hq, Sq, D]``, or without the leading dims.
        key, value: ``[B, Hkv, Sk, D]``, ``[B, Hkv, Sk, Dv]``, or likewise.
        attn_mask: boolean (True is visible) or added to the scores; broadcastable to
            ``[B, Hq, Sq, Sk]``.
        is_causal: query ``i`` sees the keys up to ``i``. With ``Sq != Sk`` that is a mask tensor
            ``[Sq, Sk]``, which is read like any other.
        enable_gqa: even groups, if no ``head_map`` is given; otherwise each query head has a KV
            head of its own, or all share one.
        head_map: the KV head of each query head.

    Returns:
        out ``[B, Hq, Sq, Dv]``, with query's leading dims.

    Raises:
        ValueError, TypeError: as :func:`gqa_kernels.asym_gqa_attention`.

    Examples:
        >>> import torch
        >>> from gqa_kernels.sdpa import scaled_dot_product_attention
        >>> q, k, v = (torch.randn(1, heads, 8, 16) for heads in (3, 2, 2))
        >>> scaled_dot_product_attention(q, k, v, is_causal=True, head_map=[0, 0, 1]).shape
        torch.Size([1, 3, 8, 16])
    """
    check_tensors(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not 2 <= x.dim() <= 4:
            raise ValueError(f"{name} must have 2 to 4 dimensions, got {x.dim()}")
    leading = query.dim() - 2  # dims before tokens and features
    q, k, v = (x[(None,) * (4 - x.dim())] for x in (query, key, value))
    batch = torch.broadcast_shapes(q.shape[:1], k.shape[:1], v.shape[:1])
    q, k, v = (x.expand(*batch, *x.shape[1:]) for x in (q, k, v))
    if head_map is None and enable_gqa:
        head_map = HeadMap.uniform(q.shape[1], k.shape[1])
    elif head_map is None:
        heads = max(q.shape[1], k.shape[1])
        q, k, v = (x.expand(-1, heads, -1, -1) for x in (q, k, v))
        head_map = HeadMap.uniform(heads, heads)
    q_len, kv_len = q.shape[2], k.shape[2]
    causal = bool(is_causal) and q_len == kv_len
    if is_causal and not causal:  # ours is aligned to the bottom right
        attn_mask = _also_below_diagonal(attn_mask, q_len, kv_len, q.device)
    out = asym_gqa_attention(
        q, k, v, head_map, attn_mask=attn_mask, dropout_p=dropout_p, causal=causal, scale=scale
    )
    return out.reshape(*out.shape[4 - 2 - leading :]) if leading < 2 else out


def _also_below_diagonal(
    attn_mask: Tensor | None, q_len: int, kv_len: int, device: torch.device
) -> Tensor:
    """A mask that also hides the keys after a query's index."""
    below = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril()
    if attn_mask is None:
        return below
    if attn_mask.dtype == torch.bool:
        return attn_mask & below
    return attn_mask.masked_fill(~below, -torch.inf)
