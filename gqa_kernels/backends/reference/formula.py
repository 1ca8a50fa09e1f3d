"""Eager torch attention: the definition of correct for every other backend.

The formula is section 3 of the design, term by term, on K and V expanded to all query heads. Rows
that see no key give 0 and LSE -inf; heads whose map entry is out of range give NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..autograd import autocast_dtype
from ..cache.inputs import AppendInputs, CacheInputs
from ..dropout import keep_mask
from ..inputs import DTYPES, UNBOUNDED, AttentionInputs
from .base import ALL_CACHES, ALL_OPTIONS, Backend, Capabilities


class ReferenceBackend(Backend):
    name = "reference"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda", "mps", "xpu", "meta"}),
        dtypes=frozenset(DTYPES),
        max_head_dim=1 << 16,
        options=ALL_OPTIONS,
        autograd=True,
        caches=ALL_CACHES,
        cache_autograd=True,
    )

    def run(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if autocast_dtype(inputs.q) is None:
            out, lse = reference_attention(inputs)
        else:  # which would round the reference's fp32 products
            with torch.autocast(inputs.device.type, enabled=False):
                out, lse = reference_attention(inputs)
        if inputs.layout == "bshd":
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, lse

    def run_cache(self, inputs: CacheInputs) -> tuple[Tensor, Tensor]:
        from .reference_cache import reference_cache_attention

        out, lse = reference_cache_attention(inputs)
        if inputs.layout == "bshd":
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, lse

    def append(self, inputs: AppendInputs) -> Tensor | None:
        from .reference_cache import append_op

        return append_op(inputs)


def reference_attention(
    inputs: AttentionInputs, matmul_dtype: torch.dtype | None = None, base2: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention by the formula; see :meth:`Backend.run` for shapes.

    Args:
        matmul_dtype: type in which both products are taken; default fp32 (fp64 for fp64 inputs).
            The input's own low precision gives the yardstick of the tolerance rule.
        base2: scale the queries first and work in units of log2(e), with powers of two, as fused
            kernels do: the same value with other rounding, for the yardstick too.
    """
    s, v, invalid = scores_and_values(inputs, matmul_dtype, base2)
    exp, log, unit = (torch.exp2, torch.log2, math.log(2)) if base2 else (torch.exp, torch.log, 1.0)
    s = s / unit
    s_max = s.detach().amax(-1, keepdim=True)
    s_max = s_max.masked_fill(s_max == -math.inf, 0)
    p = exp(s - s_max)
    z = p.sum(-1, keepdim=True)
    sees_nothing = z == 0
    z = z.masked_fill(sees_nothing, 1)
    p = drop(inputs, p[..., :-1] / z).to(inputs.dtype)  # P has the input's precision
    out = p.to(v.dtype) @ v
    lse = ((s_max + log(z)) * unit).masked_fill(sees_nothing, -math.inf).squeeze(-1)
    out = out.to(inputs.dtype).masked_fill(invalid, math.nan)
    return out, lse.masked_fill(invalid.squeeze(-1), math.nan)


def drop(inputs: AttentionInputs, p: Tensor) -> Tensor:
    """What dropout makes of ``[B, Hq, Sq, Sk]``: zeros, and the rest over ``1 - dropout_p``."""
    if inputs.dropout_seed is None:
        return p
    keep = keep_mask(inputs.dropout_seed, inputs.dropout_p, *p.shape)
    return p.masked_fill(~keep, 0) / (1 - inputs.dropout_p)


def scores_and_values(
    inputs: AttentionInputs, matmul_dtype: torch.dtype | None = None, base2: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of attention before its softmax; arguments as :func:`reference_attention` has them.

    Returns:
        s ``[B, Hq, Sq, Sk + 1]``: biased and masked scores, the last column the sinks, -inf where
        there is none. v ``[B, Hq, Sk, Dv]``: V expanded, in ``matmul_dtype``. invalid
        ``[Hq, 1, 1]``: whose map entry is out of range.
    """
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32  # scores, softmax
    matmul_dtype = matmul_dtype or dtype
    k, k_valid, k_index = _expand(inputs.k, inputs.head_map_tensor)
    v, v_valid, _ = _expand(inputs.v, inputs.value_head_map_tensor, k_index, k_valid)
    in_range, visible = _visibility(inputs, k_index)
    k = k.masked_fill(~in_range, 0)  # unused cache slots may hold NaN, and 0 * NaN is NaN
    v = v.masked_fill(~in_range, 0)

    q, scale = inputs.q.to(matmul_dtype), inputs.scale
    if base2:
        q, scale = q * scale, 1.0
    s = (q @ k.to(matmul_dtype).transpose(-1, -2)).to(dtype) * scale
    if inputs.softcap:
        s = inputs.softcap * torch.tanh(s / inputs.softcap)
    if inputs.alibi_slopes is not None:
        s = s - inputs.alibi_slopes[..., None, None] * _distance(inputs, k_index).abs()
    if inputs.attn_mask is not None and inputs.attn_mask.dtype != torch.bool:
        s = s + inputs.attn_mask
    s = s.masked_fill(~visible, -math.inf)

    # The sink is one more key with a value of zero, visible where any key is.
    sink = s.new_full((*s.shape[:-1], 1), -math.inf)
    if inputs.sinks is not None:
        sees_key = visible.any(-1, keepdim=True).expand_as(sink)
        sink = torch.where(sees_key, inputs.sinks[:, None, None].to(dtype), sink)
    invalid = ~(k_valid & v_valid)[:, None, None]
    return torch.cat([s, sink], dim=-1), v.to(matmul_dtype), invalid


def _expand(
    x: Tensor, head_map: Tensor | None, default: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``x[:, head_map]``, which entries are in range ``[Hq]``, and the clamped index ``[Hq]``."""
    if head_map is None:
        return x[:, default], valid, default
    index = head_map.long()
    valid = (index >= 0) & (index < x.shape[1])
    index = torch.where(valid, index, 0)
    return x[:, index], valid, index


def _lengths(inputs: AttentionInputs, k_index: Tensor) -> Tensor | int:
    """Keys of each sequence and head: ``Sk``, or ``[B, Hq, 1, 1]``."""
    if inputs.kv_lengths is None:
        return inputs.kv_len
    return inputs.kv_lengths[:, k_index].clamp(0, inputs.kv_len)[..., None, None].long()


def _distance(inputs: AttentionInputs, k_index: Tensor) -> Tensor:
    """Key position minus query position, queries aligned to the last key: ``[.., Sq, Sk]``."""
    i = torch.arange(inputs.q_len, device=inputs.device)[:, None]
    j = torch.arange(inputs.kv_len, device=inputs.device)
    return j - (i + _lengths(inputs, k_index) - inputs.q_len)


def _visibility(inputs: AttentionInputs, k_index: Tensor) -> tuple[Tensor, Tensor]:
    """Which key slots are in use (broadcastable to ``[B, Hq, Sk, D]``) and which keys each query
    sees (``[B, Hq, Sq, Sk]``)."""
    j = torch.arange(inputs.kv_len, device=inputs.device)
    in_range = j < _lengths(inputs, k_index)
    distance = _distance(inputs, k_index)
    visible = in_range.expand(inputs.batch, inputs.num_heads, inputs.q_len, inputs.kv_len)
    if inputs.window_left != UNBOUNDED:
        visible = visible & (distance >= -inputs.window_left)
    if inputs.window_right != UNBOUNDED:
        visible = visible & (distance <= inputs.window_right)
    if inputs.attn_mask is not None:
        mask = inputs.attn_mask
        visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return in_range[..., None] if in_range.dim() == 1 else in_range.transpose(-1, -2), visible
