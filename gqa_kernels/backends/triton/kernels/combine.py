"""Combine: merge the partial states of the decode kernel's splits.

Grid    one program per output row (sequence, query head in the plan's sorted order, query token).
Program merges the row's splits, a few at once, by the online softmax, adds the head's sink (once,
        here), and writes the output row and its LSE. A split that saw no key of the row has maximum
        -inf and weight 0, and its output is not read.
        A row of a head whose map entry is out of range becomes NaN.

Source: the merge of online-softmax states, FlashAttention (arXiv 2205.14135) section 3.1; own code.
"""

import triton
import triton.language as tl

from . import common, kv


@triton.jit(do_not_specialize=["num_heads", "num_groups", "q_len", "num_tokens", "num_splits"])
def combine_kernel(
    partial,  # Partial
    p_parts,  # [B, 2] int32: first part of a sequence and number of its parts; or None
    out,  # Rows [B, Hq, Sq, Dv]; packed [1, Hq, tokens, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous; packed [1, Hq, tokens]
    p_row_max,  # likewise, the largest score of each row, or None
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]
    p_sinks,  # [Hq] fp32, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq; of packed sequences the longest
    num_tokens,  # Sq; of packed sequences the sum
    num_splits,  # of each sequence, without p_parts
    DIMS,  # Dims
    CHUNK_S: tl.constexpr,  # splits that are merged at once
):
    i_row = tl.program_id(0).to(tl.int64)
    i_m = i_row % q_len
    i_sorted = i_row // q_len % num_heads
    i_b = i_row // q_len // num_heads
    i_token = 0
    if p_q_offsets is not None:
        i_token, n_q = kv.packed_queries(p_q_offsets, i_b, q_len, num_tokens)
        if i_m >= n_q:
            return
    i_head = tl.load(p_plan + i_sorted).to(tl.int64)
    valid = i_sorted < tl.load(p_plan + 3 * num_heads + num_groups)

    i_part = i_b * num_splits
    if p_parts is not None:
        i_part = tl.load(p_parts + 2 * i_b).to(tl.int64)
        num_splits = tl.load(p_parts + 2 * i_b + 1)
    o_dv = tl.arange(0, DIMS.BLOCK_DV)  # [BLOCK_DV]
    b_acc = tl.zeros([DIMS.BLOCK_DV], tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    row_max = tl.full([], float("-inf"), tl.float32)
    for i_s in tl.range(0, num_splits, CHUNK_S):
        o_s = i_s + tl.arange(0, CHUNK_S)  # [CHUNK_S]
        o_partial = ((i_part + o_s) * num_heads + i_sorted) * q_len + i_m
        b_max = tl.load(partial.max + o_partial, mask=o_s < num_splits, other=float("-inf"))
        b_sum = tl.load(partial.sum + o_partial, mask=o_s < num_splits, other=0.0)
        new_max = tl.maximum(row_max, tl.max(b_max, 0))
        shift = common.finite_or_zero(new_max)
        b_weight = tl.exp2(b_max - shift)  # [CHUNK_S]
        rescale = tl.exp2(row_max - shift)
        m_acc = (b_max > float("-inf"))[:, None] & (o_dv < DIMS.DV)[None, :]
        # [CHUNK_S, BLOCK_DV]
        p_acc = partial.acc + o_partial[:, None] * DIMS.DV + o_dv[None, :]
        b_new = tl.sum(tl.load(p_acc, mask=m_acc, other=0.0) * b_weight[:, None], 0)
        b_acc = b_acc * rescale + b_new
        row_sum = row_sum * rescale + tl.sum(b_sum * b_weight, 0)
        row_max = new_max

    i_out_row = kv.first_row(p_q_offsets, i_b, i_head, i_token, num_heads, num_tokens) + i_m
    if p_row_max is not None:
        most = tl.where(valid, row_max * common.LN2, float("nan"))
        tl.store(p_row_max + i_out_row, most)
    if p_sinks is not None:
        row_sum, row_max, factor = common.add_sink(row_sum, row_max, tl.load(p_sinks + i_head))
        b_acc = b_acc * factor
    b_out = b_acc * common.normaliser(row_sum)
    row_lse = common.log_sum_exp(row_sum, row_max)
    tl.store(p_lse + i_out_row, tl.where(valid, row_lse, float("nan")))
    b_out = tl.where(valid, b_out, float("nan")).to(out.ptr.dtype.element_ty)
    tl.store(kv.pointers(out, i_b, i_head, i_token + i_m) + o_dv, b_out, mask=o_dv < DIMS.DV)
