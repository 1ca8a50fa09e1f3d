"""Scores of keys and of heads, by the formula: what attention can return besides its output.

For backends whose kernels don't compute them. They take another pass over the keys in eager torch,
one query head at a time: of the last ``w`` queries for the scores of keys, of all queries for the
largest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...call.attention import AttentionCall
from .cache import dense_call, query_tokens
from .formula import scores

BLOCK_Q = 256  # queries whose scores are in memory at a time


def key_scores(
    call: AttentionCall, queries: int, base2: bool = False, rounded: bool = False
) -> Tensor:
    """``[B, Hk, capacity]``: the sum over the last ``queries`` queries, and over the query heads of
    the KV head, of the probabilities of each key. fp32; fp64 of an fp64 call. ``base2`` as in
    :func:`~.formula.reference_attention`; ``rounded``: of probabilities in the call's precision, as
    they are multiplied with V."""
    dense, is_query = _dense(call)
    first = max(dense.q_len - queries, 0)
    shape = (dense.batch, dense.num_k_heads, dense.kv_len)
    found = dense.q.new_zeros(shape, dtype=_score_dtype(dense))
    for head in range(dense.num_heads):
        for begin in range(first, dense.q_len, BLOCK_Q):
            block = slice(begin, min(begin + BLOCK_Q, dense.q_len))
            s = _scores(dense, head, block, base2)
            p = (_softmax2(s) if base2 else s.softmax(-1))[..., :-1].nan_to_num(
                0.0
            )  # NaN: the query sees no key
            p = p.masked_fill(~is_query[:, None, block, None], 0)
            index = dense.head_map_tensor[head : head + 1].long()
            valid = (index >= 0) & (index < dense.num_k_heads)
            p = p.to(dense.dtype) if rounded else p
            p = p.to(found.dtype).sum(2).masked_fill(~valid[:, None], 0)
            found.index_add_(1, torch.where(valid, index, 0), p)
    return found


def max_scores(call: AttentionCall, base2: bool = False) -> Tensor:
    """``[B, Hq]``: the largest score of each sequence and query head, -inf without any. fp32; fp64
    of an fp64 call."""
    dense, is_query = _dense(call)
    found = dense.q.new_full((dense.batch, dense.num_heads), -math.inf, dtype=_score_dtype(dense))
    if not dense.kv_len:
        return found
    for head in range(dense.num_heads):
        for begin in range(0, dense.q_len, BLOCK_Q):
            block = slice(begin, min(begin + BLOCK_Q, dense.q_len))
            s = _scores(dense, head, block, base2)[..., :-1]
            s = s / math.log(2) * math.log(2) if base2 else s
            s = s.masked_fill(~is_query[:, None, block, None], -math.inf)
            found[:, head] = torch.maximum(found[:, head], s.amax((1, 2, 3)).to(found.dtype))
    return found


def _score_dtype(call: AttentionCall) -> torch.dtype:
    return torch.float64 if call.dtype == torch.float64 else torch.float32


def _dense(call: AttentionCall) -> tuple[AttentionCall, Tensor]:
    """The call over dense tensors, without dropout, and which of its queries there are, bool
    ``[B, Sq]``."""
    dense = call if call.memory == "dense" else dense_call(call)[0]
    if call.q_offsets is None:
        is_query = torch.ones((), dtype=torch.bool, device=call.device)
        return dense, is_query.expand(dense.batch, dense.q_len)
    return dense, query_tokens(call)[1]


def _softmax2(s: Tensor) -> Tensor:
    """The softmax of scores in natural units, by powers of 2."""
    s = s / math.log(2)
    p = torch.exp2(s - s.amax(-1, keepdim=True))
    return p / p.sum(-1, keepdim=True)


def _scores(call: AttentionCall, head: int, queries: slice, base2: bool) -> Tensor:
    """Scores of a block of queries of one head, ``[B, 1, queries, Sk + 1]``, the sink last."""
    heads = slice(head, head + 1)
    slopes, sinks, mask = call.biases
    one = replace(
        call,
        q=call.q[:, heads, queries],
        head_map=call.head_map_tensor[heads],
        value_head_map=None,
        alibi_slopes=None if slopes is None else slopes[:, heads],
        sinks=None if sinks is None else sinks[heads],
        attn_mask=None if mask is None else mask[:, heads, queries],
    )
    return scores(one, base2=base2, behind=call.q_len - queries.stop)
