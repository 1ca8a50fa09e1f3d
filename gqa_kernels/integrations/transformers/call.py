"""attention_call: translates a call of transformers' attention interface for this package."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...models.maps import layer_index, layer_maps
from .guards import restore
from .masks import SequenceMask


def attention_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | SequenceMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: object,
) -> dict[str, object]:
    """The arguments of :func:`gqa_kernels.asym_gqa_attention` for a call of the interface.

    Args:
        module: the attention layer. Its ``config`` and ``layer_idx`` determine the maps.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]``, cached tokens included.
        attention_mask: ``[B, 1 or Hq, Sq, >= Sk]``, boolean or additive, including causality,
            window and padding; or a SequenceMask; or None if plain causality is enough.
        sliding_window: number of keys a query sees, including its own.
        dropout: fraction of the probabilities to drop; 0 outside training.
        s_aux: attention sinks ``[Hq]``.
        position_bias: ``[1 or B, Hq, Sq, Sk]``, added to the scores (T5).
        cu_seq_lens_q: ``[n + 1]``, offsets of the packed sequences in the single row. Sequences
            don't see one another, even if the model's mask ignores position ids (GPT-OSS).
        position_ids: ``[..., S]``, positions of all new tokens. Layers that share keys and values
            (Gemma 4) may receive only the last queries.
    """
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
        # The rotation leaves q and k in fp32, other than v: one type, as SDPA takes them.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q_len = query.shape[2]
    new = q_len
    if position_ids is not None and getattr(module, "is_kv_shared_layer", False):
        new = max(new, position_ids.shape[-1])
    causal = False
    window = None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(attention_mask, SequenceMask):
        is_causal, sliding_window = True, attention_mask.window
        attention_mask = None if attention_mask.offsets is None else attention_mask.dense
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        attention_mask = _packed(cu_seq_lens_q, q_len, is_causal, sliding_window, attention_mask)
    if attention_mask is None:
        causal = new > 1 and is_causal
        if causal:
            # Prefill into an empty static cache: its slots beyond the prompt are still empty.
            key, value = key[:, :, :new], value[:, :, :new]
        if sliding_window is not None:
            window = (sliding_window - 1, None)
    else:
        attention_mask = attention_mask[..., : key.shape[2]]
    if position_bias is not None:
        attention_mask = with_bias(attention_mask, position_bias[..., : key.shape[2]])
    config = getattr(module, "config", None)
    head_map, value_head_map = layer_maps(
        config,
        layer_index(module),
        query.shape[1],
        key.shape[1],
        value.shape[1],
    )
    if not torch.compiler.is_compiling():
        restore(config, value_head_map is not None or not head_map.is_uniform)
    return {
        "q": query.transpose(1, 2),
        "k": key.transpose(1, 2),
        "v": value.transpose(1, 2),
        "head_map": head_map,
        "value_head_map": value_head_map,
        "causal": causal,
        "scale": scaling,
        "window": window,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "attn_mask": attention_mask,
        "layout": "bshd",
    }


def with_bias(attention_mask: Tensor | None, bias: Tensor) -> Tensor:
    """The sum of a bias and a mask, as an additive mask."""
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, -math.inf)
    return bias + attention_mask


def _packed(
    offsets: Tensor, tokens: int, causal: bool, window: int | None, mask: Tensor | None
) -> Tensor:
    """A mask ``[1, 1, tokens, tokens]`` that limits attention to each packed sequence."""
    position = torch.arange(tokens, device=offsets.device)
    sequence = torch.bucketize(position, offsets[1:-1], right=True)
    visible = sequence[:, None] == sequence
    if causal:
        visible &= position[:, None] >= position
    if window is not None:
        visible &= position[:, None] - position < window
    visible = visible[None, None]
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.where(visible, -math.inf)
