"""Backward, gradients of Q and of the ALiBi slopes, and what those of the sinks need.

Grid    as prefill's: one program per (sequence, query head, block of BLOCK_M query tokens), heads
        in the plan's order in sections whose K and V fit the L2 cache, last block first.
Program keeps its block of Q and dO, and walks over the key blocks that some row can see:
        recomputes P from the LSE and adds up dQ += dS K in fp32. A head whose map entry is out of
        range gives NaN. The slope's gradient is left as one sum per program, for the caller to add
        up in a fixed order. It and the sink's have whole rows in one number, where it would show
        that delta comes from the output, which is rounded: for them, delta is summed anew.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2 in two passes, so that nothing is summed
through memory; own code.
"""

import triton
import triton.language as tl

from . import common, kv
from .backward_common import load_lse, probabilities, through_cap, through_dropout
from .dropout import keep_tile
from .prefill import find_query_block


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_groups",
        "q_len",
        "kv_len",
        "num_blocks",
        "heads_per_section",
        "window_left",
        "window_right",
        "dropout_threshold",
        "num_tokens",
    ]
)
def backward_q_kernel(
    p_q,  # [B, Hq, Sq, D]; packed [1, Hq, tokens, D], likewise all of queries
    p_k,  # [B, Hk, Sk, D]; packed [1, Hk, tokens, D], likewise V
    p_v,  # [B, Hv, Sk, Dv]
    p_dout,  # [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous
    p_dlse,  # [B, Hq, Sq] fp32, contiguous, or None
    p_delta,  # [B, Hq, Sq] fp32, contiguous; with HAS_SUMS replaced by its sum over the keys
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]
    p_slopes,  # [B, Hq] fp32 or None
    p_mask,  # [B, Hq, Sq, Sk] uint8 or floating, or None
    p_lengths,  # [B, Hk] int32 or None
    p_seed,  # int64 [2] dropout seed and offset, or None
    p_begin,  # [B] int32, first key of packed sequences, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    p_dq,  # [B, Hq, Sq, D]
    p_dslopes,  # [B, Hq, num_blocks] fp32, or None
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_slopes_b,
    stride_slopes_h,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_lengths_b,
    stride_lengths_h,
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq; of packed sequences the longest
    kv_len,  # Sk; of packed sequences all
    num_blocks,  # ceil(Sq / BLOCK_M)
    heads_per_section,
    num_tokens,  # of all packed sequences
    scale,
    softcap,
    window_left,
    window_right,
    dropout_threshold,
    dropout_scale,  # 1 / (1 - p)
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_DSLOPES: tl.constexpr,
    HAS_SUMS: tl.constexpr,  # with gradients of slopes or sinks
    HAS_DLSE: tl.constexpr,
):
    i_b, i_sorted, i_block = find_query_block(num_heads, num_blocks, heads_per_section)
    i_head = tl.load(p_plan + i_sorted).to(tl.int64)
    i_k_head = tl.load(p_plan + num_heads + i_sorted).to(tl.int64)
    i_v_head = tl.load(p_plan + 2 * num_heads + i_sorted).to(tl.int64)
    num_valid = tl.load(p_plan + 3 * num_heads + num_groups)
    valid = i_sorted < num_valid

    # Rows of the tile: the query tokens of one block.
    i_token, n_q = 0, q_len
    i_first = i_block * BLOCK_M
    if p_q_offsets is not None:
        i_token, n_q = kv.packed_queries(p_q_offsets, i_b, q_len, num_tokens)
        if i_first >= n_q:
            return
    i_last = tl.minimum(i_first + BLOCK_M, n_q) - 1

    # Keys of the sequence; none for a head without a KV head.
    n, begin = kv_len, 0
    if p_begin is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_begin + i_b), 0), kv_len)
        n = kv_len - begin
    if HAS_LENGTHS:
        p_length = p_lengths + i_b * stride_lengths_b + i_k_head * stride_lengths_h
        n = tl.minimum(tl.maximum(tl.load(p_length, mask=valid, other=0), 0), n)
    n = tl.where(valid, n, 0)
    shift = n - n_q

    o_m = i_first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_m < n_q  # [BLOCK_M]
    o_m64 = o_m.to(tl.int64)
    b_pos = o_m + shift  # [BLOCK_M]
    slope = None
    if HAS_ALIBI:
        slope = tl.load(p_slopes + i_b * stride_slopes_b + i_head * stride_slopes_h)
    p_mask_rows = None
    if MASK_KIND != common.NO_MASK:
        # [BLOCK_M, 1]
        p_mask_head = p_mask + i_b * stride_mask_b + i_head * stride_mask_h
        p_mask_rows = (p_mask_head + o_m64 * stride_mask_m)[:, None]
    o_dropout_head = None
    if HAS_DROPOUT:
        o_dropout_head = tl.zeros([BLOCK_M], tl.int32) + (i_b * num_heads + i_head).to(tl.int32)

    i_row = (i_b * num_heads + i_head) * q_len  # of the LSE and of delta
    if p_q_offsets is not None:
        i_row = i_head * num_tokens + i_token
    b_lse = load_lse(p_lse + i_row + o_m64, m_rows)  # [BLOCK_M]
    b_delta = tl.load(p_delta + i_row + o_m64, mask=m_rows, other=0.0)  # [BLOCK_M]
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    o_token = i_token + o_m64
    p_q_rows = p_q + i_b * stride_qb + i_head * stride_qh + o_token * stride_qm
    p_dout_rows = p_dout + i_b * stride_dob + i_head * stride_doh + o_token * stride_dom
    b_q = kv.load_rows(p_q_rows, m_rows, HEAD_DIM, BLOCK_D, True)
    b_dout = kv.load_rows(p_dout_rows, m_rows, VALUE_DIM, BLOCK_DV, True)
    i_slot = tl.cast(begin, tl.int64)
    p_k_head = p_k + i_b * stride_kb + i_k_head * stride_kh + i_slot * stride_kn
    p_v_head = p_v + i_b * stride_vb + i_v_head * stride_vh + i_slot * stride_vn

    start, inner_start, inner_stop, stop = common.visible_keys(
        i_first, i_last, shift, n, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Over the keys: P * dP, P * distance and P * dP * distance.
    b_dp_sum = tl.zeros([BLOCK_M], tl.float32)
    b_distance_sum = tl.zeros([BLOCK_M], tl.float32)
    b_dp_distance_sum = tl.zeros([BLOCK_M], tl.float32)
    o_block = tl.arange(0, BLOCK_N)
    for part in tl.static_range(
        common.LEFT_EDGE if HAS_LEFT else common.INNER, common.RIGHT_EDGE + 1
    ):
        if part == common.LEFT_EDGE:
            part_start, part_stop = start, inner_start
        elif part == common.INNER:
            part_start, part_stop = inner_start, inner_stop
        else:
            part_start, part_stop = inner_stop, stop
        for i_n in tl.range(part_start, part_stop, BLOCK_N):
            o_n = i_n + o_block  # [BLOCK_N]
            o_n64 = o_n.to(tl.int64)
            m_n = o_n < n
            edge = part != common.INNER
            # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
            b_k = kv.load_rows(p_k_head + o_n64 * stride_kn, m_n, HEAD_DIM, BLOCK_D, edge)
            b_v = kv.load_rows(p_v_head + o_n64 * stride_vn, m_n, VALUE_DIM, BLOCK_DV, edge)
            b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            b_capped = common.cap_scores(b_qk, scale, softcap, HAS_SOFTCAP)
            b_score = common.bias_and_mask(
                b_capped,
                o_n[None, :],
                b_pos[:, None],
                m_rows[:, None],
                slope,
                p_mask_rows,
                stride_mask_n,
                n,
                window_left,
                window_right,
                edge,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_ALIBI,
                MASK_KIND,
            )
            b_p = probabilities(b_score, b_lse[:, None], b_q.dtype == tl.float32)
            m_keep = None
            if HAS_DROPOUT:
                m_keep = keep_tile(
                    p_seed, i_n, o_m, o_dropout_head, dropout_threshold, BLOCK_M, BLOCK_N
                )
            b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
            b_dp = through_dropout(b_dp, m_keep, dropout_scale, HAS_DROPOUT)
            if HAS_SUMS:
                b_dp_sum += tl.sum(b_p * b_dp, 1)
            if HAS_DSLOPES:
                b_distance = tl.abs(b_pos[:, None] - o_n[None, :]).to(tl.float32)
                b_distance_sum += tl.sum(b_p * b_distance, 1)
                b_dp_distance_sum += tl.sum(b_p * b_dp * b_distance, 1)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_ds = through_cap(b_ds, b_capped, softcap, HAS_SOFTCAP)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    p_dq_rows = p_dq + i_b * stride_dqb + i_head * stride_dqh + o_token * stride_dqm
    b_dq = tl.where(valid, b_dq * scale, float("nan"))
    common.store_rows(p_dq_rows, b_dq, m_rows, HEAD_DIM, BLOCK_D)
    if HAS_SUMS:
        b_delta = b_dp_sum
        if HAS_DLSE:
            b_delta -= tl.load(p_dlse + i_row + o_m64, mask=m_rows, other=0.0)
        tl.store(p_delta + i_row + o_m64, b_delta, mask=m_rows)
    if HAS_DSLOPES:
        b_dslope = tl.where(b_lse < float("inf"), b_delta * b_distance_sum - b_dp_distance_sum, 0.0)
        p_dslope = p_dslopes + (i_b * num_heads + i_head) * num_blocks + i_block
        tl.store(p_dslope, tl.sum(b_dslope, 0))
