"""The formula, term by term, on K and V expanded to all query heads: what every backend computes.

    s = scale * q . k;  s = softcap * tanh(s / softcap);  s += -slope * distance + additive mask
    out = softmax over visible keys (and the sink) of s . v

Rows that see no key give 0 and LSE -inf; heads whose map entry is out of range give NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...call.attention import AttentionCall
from ...call.options import LOWEST_MASK_VALUE, UNBOUNDED
from ...native.dropout import keep_mask


def reference_attention(
    call: AttentionCall, matmul_dtype: torch.dtype | None = None, base2: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by the formula; see :meth:`Backend.attend` for shapes.

    Args:
        matmul_dtype: type in which both products are taken; default fp32 (fp64 for fp64 inputs).
            The call's own low precision gives the yardstick of the tolerance rule.
        base2: scale the queries first and work in units of log2(e), with powers of two, as fused
            kernels do: the same value with other rounding, for the yardstick too.
        keep: which probabilities dropout keeps, as :func:`keep_mask` has them; default by the seed.
    """
    s, v, invalid = scores_and_values(call, matmul_dtype, base2)
    exp, log, unit = (torch.exp2, torch.log2, math.log(2)) if base2 else (torch.exp, torch.log, 1.0)
    s = s / unit
    s_max = s.detach().amax(-1, keepdim=True)
    s_max = s_max.masked_fill(s_max == -math.inf, 0)
    p = exp(s - s_max)
    in_order = call.options.batch_invariant
    z = sum_in_order(p, -1) if in_order else p.sum(-1, keepdim=True)
    sees_nothing = z == 0
    z = z.masked_fill(sees_nothing, 1)
    p = drop(call, p[..., :-1] / z, keep).to(call.dtype)  # P has the input's precision
    p = p.to(v.dtype)
    out = matmul_in_order(p, v) if in_order else p @ v
    lse = ((s_max + log(z)) * unit).masked_fill(sees_nothing, -math.inf).squeeze(-1)
    out = out.to(call.dtype).masked_fill(invalid, math.nan)
    return out, lse.masked_fill(invalid.squeeze(-1), math.nan)


def sum_in_order(x: Tensor, dim: int) -> Tensor:
    """``x.sum(dim, keepdim=True)``, added one by one: zeros behind the others change no bit, nor
    does the shape of ``x``."""
    return x.cumsum(dim).narrow(dim, x.shape[dim] - 1, 1) if x.shape[dim] else x.sum(dim, True)


def matmul_in_order(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` likewise, row by row: slow."""
    rows = [sum_in_order(a[..., i, :, None] * b, -2) for i in range(a.shape[-2])]
    return torch.cat(rows, -2) if rows else a @ b


def drop(call: AttentionCall, p: Tensor, keep: Tensor | None = None) -> Tensor:
    """What dropout makes of ``[B, Hq, Sq, Sk]``: zeros, and the rest over ``1 - dropout_p``."""
    if call.dropout_seed is None:
        return p
    if keep is None:
        keep = keep_mask(call.dropout_seed, call.options.dropout_p, *p.shape)
    return p.masked_fill(~keep, 0) / (1 - call.options.dropout_p)


def scores_and_values(
    call: AttentionCall, matmul_dtype: torch.dtype | None = None, base2: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of attention before its softmax; arguments as :func:`reference_attention` has them.

    Returns:
        s ``[B, Hq, Sq, Sk + 1]``, as :func:`scores` has it. v ``[B, Hq, Sk, Dv]``: V expanded, in
        ``matmul_dtype``. invalid ``[Hq, 1, 1]``: whose map entry is out of range.
    """
    matmul_dtype = matmul_dtype or _wide(call)
    k_index, k_valid = _clamped(call.head_map_tensor, call.num_k_heads)
    value_map = call.value_head_map_tensor
    v_index, v_valid = k_index, k_valid
    if value_map is not None:
        v_index, v_valid = _clamped(value_map, call.num_v_heads)
    v = call.v.to(matmul_dtype)[:, v_index]
    v = v.masked_fill(~visibility(call, k_index)[0], 0)  # as in K
    return scores(call, matmul_dtype, base2), v, ~(k_valid & v_valid)[:, None, None]


def scores(
    call: AttentionCall, matmul_dtype: torch.dtype | None = None, base2: bool = False,
    behind: int = 0,
) -> Tensor:  # fmt: skip
    """Biased and masked scores ``[B, Hq, Sq, Sk + 1]``, the last column the sinks, -inf where there
    is none; arguments as :func:`reference_attention` has them. ``behind``: queries of the sequence
    that come after these."""
    dtype = _wide(call)  # of scores and softmax
    matmul_dtype = matmul_dtype or dtype
    k_index, _ = _clamped(call.head_map_tensor, call.num_k_heads)
    # Converted before it is expanded, so that gradients of a group are summed in that type.
    k = call.k.to(matmul_dtype)[:, k_index]
    in_range, visible = visibility(call, k_index, behind)
    k = k.masked_fill(~in_range, 0)  # unused cache slots may hold NaN, and 0 * NaN is NaN

    q, scale = call.q.to(matmul_dtype), call.scale
    if base2:
        q, scale = q * scale, 1.0
    k = k.transpose(-1, -2)
    s = matmul_in_order(q, k) if call.options.batch_invariant else q @ k
    s = s.to(dtype) * scale
    if call.options.softcap:
        s = call.options.softcap * torch.tanh(s / call.options.softcap)
    if call.alibi_slopes is not None:
        s = s - call.alibi_slopes[..., None, None] * _distance(call, k_index, behind).abs()
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        s = s + call.attn_mask
    s = s.masked_fill(~visible, -math.inf)

    # The sink is one more key with a value of zero, visible where any key is.
    sink = s.new_full((*s.shape[:-1], 1), -math.inf)
    if call.sinks is not None:
        sees_key = visible.any(-1, keepdim=True).expand_as(sink)
        sink = torch.where(sees_key, call.sinks[:, None, None].to(dtype), sink)
    return torch.cat([s, sink], dim=-1)


def _wide(call: AttentionCall) -> torch.dtype:
    """The type of scores and softmax."""
    return torch.float64 if call.dtype == torch.float64 else torch.float32


def _clamped(head_map: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """The KV head of each query head, 0 for an entry out of range, and which entries are in range;
    both ``[Hq]``."""
    index = head_map.long()
    valid = (index >= 0) & (index < num_kv_heads)
    return torch.where(valid, index, 0), valid


def _lengths(call: AttentionCall, k_index: Tensor) -> Tensor | int:
    """Keys of each sequence and head: ``Sk``, or ``[B, Hq, 1, 1]``."""
    if call.kv.kv_lengths is None:
        return call.kv_len
    return call.kv.kv_lengths[:, k_index].clamp(0, call.kv_len)[..., None, None].long()


def _distance(call: AttentionCall, k_index: Tensor, behind: int) -> Tensor:
    """Key position minus query position, queries aligned to the last key: ``[.., Sq, Sk]``."""
    i = torch.arange(call.q_len, device=call.device)[:, None]
    j = torch.arange(call.kv_len, device=call.device)
    return j - (i + _lengths(call, k_index) - call.q_len - behind)


def visibility(call: AttentionCall, k_index: Tensor, behind: int = 0) -> tuple[Tensor, Tensor]:
    """Which key slots are in use (broadcastable to ``[B, Hq, Sk, D]``) and which keys each query
    sees (``[B, Hq, Sq, Sk]``)."""
    j = torch.arange(call.kv_len, device=call.device)
    in_range = j < _lengths(call, k_index)
    distance = _distance(call, k_index, behind)
    visible = in_range.expand(call.batch, call.num_heads, call.q_len, call.kv_len)
    if call.options.window_left != UNBOUNDED:
        visible = visible & (distance >= -call.options.window_left)
    if call.options.window_right != UNBOUNDED:
        visible = visible & (distance <= call.options.window_right)
    if call.key_ranges is not None:
        begin, end = call.key_ranges.unbind(-1)
        visible = visible & (begin[..., None] <= j) & (j < end[..., None])
    if call.attn_mask is not None:
        mask = call.attn_mask
        hidden = ~mask if mask.dtype == torch.bool else mask.float() < LOWEST_MASK_VALUE
        visible = visible & ~hidden
    return in_range[..., None] if in_range.dim() == 1 else in_range.transpose(-1, -2), visible
