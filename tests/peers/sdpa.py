"""torch.nn.functional.scaled_dot_product_attention over ours, with one more argument: the map.

Causality is aligned to the top left; leading dims are any and broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels import HeadMap, asym_gqa_attention


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, *, head_map=None,
) -> Tensor:  # fmt: skip
    leading = query.dim() - 2  # [E], [H, E], [B, H, E]: dims before tokens and features
    q, k, v = (x[(None,) * (4 - x.dim())] if x.dim() < 4 else x for x in (query, key, value))
    batch = torch.broadcast_shapes(q.shape[:1], k.shape[:1], v.shape[:1])
    q, k, v = (x.expand(*batch, *x.shape[1:]) for x in (q, k, v))
    if head_map is None and enable_gqa:
        head_map = HeadMap.uniform(q.shape[1], k.shape[1])
    elif head_map is None:
        heads = max(q.shape[1], k.shape[1])
        q, k, v = (x.expand(-1, heads, -1, -1) for x in (q, k, v))
        head_map = range(heads)
    q_len, kv_len = q.shape[2], k.shape[2]
    causal = is_causal and q_len == kv_len
    if is_causal and not causal:  # ours is aligned to the bottom right: a mask says it
        below = torch.ones(q_len, kv_len, dtype=torch.bool).tril()
        if attn_mask is None:
            attn_mask = below
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & below
        else:
            attn_mask = attn_mask.masked_fill(~below, -torch.inf)
    out = asym_gqa_attention(
        q, k, v, head_map, attn_mask=attn_mask, dropout_p=dropout_p, causal=causal, scale=scale
    )
    return out.reshape(*out.shape[4 - 2 - leading :]) if leading < 2 else out
