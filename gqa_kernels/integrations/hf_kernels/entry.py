"""Asymmetric grouped-query attention, in the form that Hugging Face ``kernels`` loads.

``repository.build`` makes this the ``__init__.py`` of a kernel repository, with the package in
``core``.
"""

import torch

from .core import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    merge_attention_states,
)
from .core.integrations.transformers import asym_gqa

supports_flash_attn = True  # makes transformers register flash_attn_forward


def flash_attn_forward(module, query, key, value, attention_mask=None, **options):
    """transformers' attention interface; the maps come from the model's config.

    Args:
        module: the attention layer.
        query: ``[B, Hq, Sq, D]``; key and value ``[B, Hkv, Sk, D]``, cached tokens included.
        attention_mask: as for ``sdpa``, or ``[B, Sk]`` with 0 at padding, as for flash attention.

    Returns:
        ``[B, Sq, Hq, Dv]``, and None for the probabilities.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = _visible(module, query, key, attention_mask, **options)
    return asym_gqa(module, query, key, value, attention_mask, **options), None


flash_attn_forward.reads_head_maps = True  # allows uneven layers to run on it


def _visible(module, query, key, padding, is_causal=None, sliding_window=None, **_) -> torch.Tensor:
    """Padding, causality and window as one boolean mask ``[B, 1, Sq, Sk]``."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    ahead = torch.arange(num_keys, device=key.device) - (
        torch.arange(num_queries, device=key.device)[:, None] + num_keys - num_queries
    )  # positions of query i minus key j, [Sq, Sk]
    visible = padding[:, None, None, :num_keys].bool()
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        visible = visible & (ahead <= 0)
    if sliding_window is not None:
        visible = visible & (ahead > -sliding_window)
    return visible


__all__ = [
    "DenseKVCache",
    "HeadMap",
    "PagedKVCache",
    "asym_gqa_attention",
    "asym_gqa_decode",
    "asym_gqa_varlen_attention",
    "flash_attn_forward",
    "merge_attention_states",
    "supports_flash_attn",
]
