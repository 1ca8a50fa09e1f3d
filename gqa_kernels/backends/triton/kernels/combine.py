"""Combine: merge the partial states of the decode kernel's splits.

Grid    one program per output row (sequence, query head in the plan's sorted order, query token).
Program takes the maximum of the row's splits, rescales their sums and unnormalised outputs to it,
        adds the head's sink (once, here), and writes the output row and its LSE. A split that saw
        no key of the row has maximum -inf and weight 0, and its output is not read.
        A row of a head whose map entry is out of range becomes NaN.

Source: the merge of online-softmax states, FlashAttention (arXiv 2205.14135) section 3.1; own code.
"""

import triton
import triton.language as tl

from . import common, kv


@triton.jit(do_not_specialize=["num_heads", "num_groups", "q_len", "num_tokens", "num_splits"])
def combine_kernel(
    partial,  # Partial
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
    num_splits,
    DIMS,  # Dims
    BLOCK_S: tl.constexpr,  # num_splits, rounded up to a power of two
    CHUNK_S: tl.constexpr,  # splits whose outputs are held at once
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

    o_s = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    m_s = o_s < num_splits
    p_sum = partial.sum + i_row * num_splits
    p_max = partial.max + i_row * num_splits
    b_max = tl.load(p_max + o_s, mask=m_s, other=float("-inf"))  # [BLOCK_S]
    b_sum = tl.load(p_sum + o_s, mask=m_s, other=0.0)  # [BLOCK_S]
    row_max = tl.max(b_max, 0)
    row_shift = common.finite_or_zero(row_max)
    row_sum = tl.sum(b_sum * tl.exp2(b_max - row_shift), 0)

    o_dv = tl.arange(0, DIMS.BLOCK_DV)  # [BLOCK_DV]
    b_acc = tl.zeros([DIMS.BLOCK_DV], tl.float32)
    for i_s in tl.range(0, num_splits, CHUNK_S):
        o_chunk = i_s + tl.arange(0, CHUNK_S)  # [CHUNK_S]
        b_chunk_max = tl.load(p_max + o_chunk, mask=o_chunk < num_splits, other=float("-inf"))
        b_weight = tl.exp2(b_chunk_max - row_shift)  # [CHUNK_S]
        m_acc = (b_chunk_max > float("-inf"))[:, None] & (o_dv < DIMS.DV)[None, :]
        # [CHUNK_S, BLOCK_DV]
        p_acc = partial.acc + (i_row * num_splits + o_chunk)[:, None] * DIMS.DV + o_dv[None, :]
        b_acc += tl.sum(tl.load(p_acc, mask=m_acc, other=0.0) * b_weight[:, None], 0)

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
