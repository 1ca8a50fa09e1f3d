"""Held-out attention-output error: what a change of KV heads does to one layer, on inputs that the
search has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from .weights import LayerWeights, Rotary

Inputs = Tensor | Mapping[str, Tensor]


def attention_output(
    weights: LayerWeights,
    hidden_states: Tensor,
    *,
    causal: bool,
    padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_states: Tensor | None = None,
) -> Tensor:
    """What the attention module of a layer computes.

    Args:
        hidden_states: ``[B, S, d]`` its input; token ``j`` of a row stands at position ``j``.
        causal: whether token ``i`` sees the tokens ``<= i`` only.
        padding_mask: ``[B, Sk]``, False or 0 on tokens that nobody sees.
        bias: added to the scores, broadcastable to ``[B, Hq, S, Sk]`` (T5's relative positions).
        kv_states: ``[B, Sk, d_kv]`` input of K and V, in cross-attention.

    Returns:
        ``[B, S, d_out]``.

    Raises:
        ValueError: the layer rotates q and k at frequencies that it doesn't give.
    """
    source = hidden_states if kv_states is None else kv_states
    q = _project(hidden_states, weights.q, weights.q_bias)  # [B, Hq, S, D]
    k = _project(source, weights.k, weights.k_bias)
    v = _project(source, weights.v, weights.v_bias)
    D = q.shape[-1]
    if weights.q_norm is not None:
        q = rms_norm(q, (D,), weights.q_norm, weights.norm_eps)
    if weights.k_norm is not None:
        k = rms_norm(k, (D,), weights.k_norm, weights.norm_eps)
    if weights.rotary is not None:
        q, k = _rotate(q, weights.rotary), _rotate(k, weights.rotary)
    k, v = k[:, list(weights.key_map.entries)], v[:, list(weights.value_map.entries)]
    mask = bias
    if causal or padding_mask is not None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen.tril(k.shape[2] - q.shape[2]) if causal else seen
        if padding_mask is not None:
            seen = seen & padding_mask.bool()[:, None, None, :]
        shift = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -math.inf)
        mask = shift if bias is None else shift + bias
    heads = scaled_dot_product_attention(q, k, v, mask, scale=weights.scale)
    out = torch.einsum("bhsv,ohv->bso", heads, weights.o)
    return out if weights.o_bias is None else out + weights.o_bias


@torch.no_grad()
def output_error(
    parent: LayerWeights,
    child: LayerWeights,
    batches: Iterable[Inputs],
    *,
    causal: bool,
) -> float:
    """Relative error ``|child - parent| / |parent|`` of a layer's attention output.

    Norms are over all tokens that are not padding; the output's own bias is left out of both.

    Args:
        batches: held-out inputs of the layer: ``hidden_states [B, S, d]``, or dicts of the tensors
            that ``attention_output`` takes.
        causal: whether tokens see earlier ones only.

    Raises:
        ValueError: no tokens, or outputs that are not finite.
    """
    difference = reference = 0.0
    for batch in batches:
        inputs = {"hidden_states": batch} if isinstance(batch, Tensor) else dict(batch)
        given = attention_output(parent, **inputs, causal=causal)
        now = attention_output(child, **inputs, causal=causal)
        mask = inputs.get("padding_mask")
        if mask is not None and inputs.get("kv_states") is None:
            given, now = given[mask.bool()], now[mask.bool()]
        difference += float((now - given).double().square().sum())
        base = given if parent.o_bias is None else given - parent.o_bias
        reference += float(base.double().square().sum())
    if not (math.isfinite(difference) and math.isfinite(reference)):
        raise ValueError("activations must be finite, got NaN or inf in an attention output")
    if reference == 0:
        raise ValueError("batches must hold tokens with an attention output, got none")
    return math.sqrt(difference / reference)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, S, d]`` -> ``[B, H, S, D]``."""
    out = torch.einsum("bsd,hed->bhse", x, weight)
    return out if bias is None else out + bias[:, None]


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate ``[B, H, S, D]`` by its positions ``0 .. S - 1``."""
    if rotary.frequencies is None:
        raise ValueError("rotary.frequencies must be given to evaluate a layer, got None")
    frequencies = torch.tensor(rotary.frequencies, dtype=torch.float64, device=x.device)
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies  # [S, P]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = rotary.planes.to(x.device).T
    out = x.clone()
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out
