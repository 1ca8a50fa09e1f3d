"""Attention as four nested loops over numbers, written apart from the package's reference."""

import math

import numpy as np

HIDING = -(2 - 2**-23) * 2.0**126  # half of fp32's lowest number: additive values below it hide


def dense_attention(
    q, k, v, head_map, *, value_head_map=None, causal=False, scale=None, window=None,
    softcap=None, alibi_slopes=None, sinks=None, attn_mask=None, kv_lengths=None,
    batch_invariant=False, key_ranges=None,
):  # fmt: skip
    """out ``[B, Hq, Sq, Dv]`` and LSE ``[B, Hq, Sq]`` in fp64 from bhsd torch tensors.
    ``batch_invariant`` concerns rounding alone."""
    q, k, v = (x.detach().double().cpu().numpy() for x in (q, k, v))
    batch, heads, q_len, dim = q.shape
    k_heads, k_len = k.shape[1:3]
    if alibi_slopes is not None:
        alibi_slopes = np.broadcast_to(alibi_slopes.double().cpu().numpy(), (batch, heads))
    if attn_mask is not None:
        kind = attn_mask.dtype
        attn_mask = np.broadcast_to(attn_mask.double().cpu().numpy(), (batch, heads, q_len, k_len))
        boolean = "bool" in str(kind)
    if key_ranges is not None:
        key_ranges = np.broadcast_to(key_ranges.cpu().numpy(), (batch, heads, q_len, 2))
    if kv_lengths is not None:
        kv_lengths = np.asarray(kv_lengths).reshape(batch, -1)
        kv_lengths = np.broadcast_to(kv_lengths, (batch, k_heads))
    head_map = [int(g) for g in head_map]
    value_head_map = head_map if value_head_map is None else [int(g) for g in value_head_map]
    left, right = window or (None, None)

    out = np.zeros((batch, heads, q_len, v.shape[3]))
    lse = np.full((batch, heads, q_len), -math.inf)
    for b, h, i in np.ndindex(batch, heads, q_len):
        kv = head_map[h]
        n = k_len if kv_lengths is None else int(kv_lengths[b, kv])
        position = i + n - q_len
        scores = {}
        for j in range(n):
            if causal and j > position:
                continue
            if left is not None and j < position - left:
                continue
            if right is not None and j > position + right:
                continue
            if key_ranges is not None and not key_ranges[b, h, i, 0] <= j < key_ranges[b, h, i, 1]:
                continue
            s = float(q[b, h, i] @ k[b, kv, j]) * (dim**-0.5 if scale is None else scale)
            if softcap is not None:
                s = softcap * math.tanh(s / softcap)
            if alibi_slopes is not None:
                s -= alibi_slopes[b, h] * abs(position - j)
            if attn_mask is not None:
                entry = attn_mask[b, h, i, j]
                if (boolean and not entry) or entry < HIDING:
                    continue
                s += 0.0 if boolean else entry
            scores[j] = s
        if not scores:
            continue
        extra = [] if sinks is None else [float(sinks[h])]
        top = max([*scores.values(), *extra])
        total = sum(math.exp(s - top) for s in [*scores.values(), *extra])
        lse[b, h, i] = top + math.log(total)
        for j, s in scores.items():
            out[b, h, i] += math.exp(s - top) / total * v[b, value_head_map[h], j]
    return out, lse
