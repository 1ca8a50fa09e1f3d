"""Backward, gradients of Q and of the ALiBi slopes, and what those of the sinks need.

Grid    as prefill's: one program per (sequence, query head, block of BLOCK_M query tokens, slice of
        the columns of dQ), heads in the plan's order in sections whose K and V fit the L2 cache,
        last block first. There is one slice up to D 256.
Program keeps its block of Q and dO, and walks over the key blocks that some row can see:
        recomputes P from the LSE and adds up dQ += dS K in fp32. A head whose map entry is out of
        range gets NaN. Each program writes one sum for the gradient of its head's slope, and the
        caller adds these up in a fixed order. The gradients of slopes and sinks sum whole rows
        into one number, which would show that delta comes from the rounded output. With them
        the kernel also writes delta corrected by the sum of dS: with an exact delta that sum is
        dlse + delta * the sink's probability.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2 in two passes, so that nothing is summed
through memory; own code.
"""

import triton
import triton.language as tl

from . import common, kv
from .arguments import Window
from .backward_common import (
    load_lse,
    probabilities,
    row_products,
    through_cap,
    through_dropout,
)
from .dropout import keep_tile
from .prefill import find_query_block


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_groups",
        "q_len",
        "kv_len",
        "num_tokens",
        "num_blocks",
        "heads_per_section",
        "window_left",
        "window_right",
        "dropout_threshold",
    ]
)
def backward_q_kernel(
    q,  # Rows [B, Hq, Sq, D]; packed [1, Hq, tokens, D], likewise all of queries
    keys,  # Stored [B, Hk, Sk, D]; packed [1, Hk, tokens, D], likewise all of keys
    values,  # Stored [B, Hv, Sk, Dv]
    dout,  # Rows [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous
    p_dlse,  # [B, Hq, Sq] fp32, contiguous, or None
    p_delta,  # [B, Hq, Sq] fp32, contiguous
    p_exact_delta,  # likewise, delta without the output's rounding, written; or None
    dq,  # Rows [B, Hq, Sq, D]
    p_dslopes,  # [B, Hq, num_blocks] fp32, or None
    p_sinks,  # [Hq] fp32, or None
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]
    slopes,  # PerHead [B, Hq] fp32, or None
    mask,  # Mask, or None
    lengths,  # PerHead [B, Hk] int32, or None
    p_begin,  # [B] int32, first key of packed sequences, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    p_seed,  # int64 [2] dropout seed and offset, or None
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq; of packed sequences the longest
    kv_len,  # Sk; of packed sequences the sum
    num_tokens,  # Sq; of packed sequences the sum
    num_blocks,  # ceil(Sq / BLOCK_M)
    heads_per_section,
    scale,
    log2_scale,  # scale * log2(e) if nothing else changes the scores, else None
    softcap,  # or None
    window_left,  # or None
    window_right,  # or None
    dropout_threshold,  # or None
    dropout_scale,  # 1 / (1 - p)
    DIMS,  # Dims
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HAS_SUMS: tl.constexpr = p_exact_delta is not None  # gradients of slopes or sinks
    D_CHUNKED: tl.constexpr = DIMS.D > DIMS.BLOCK_D
    DV_CHUNKED: tl.constexpr = DIMS.DV > DIMS.BLOCK_DV
    i_program, i_col = common.program_slice(DIMS.D, DIMS.BLOCK_D)
    i_b, i_sorted, i_block = find_query_block(i_program, num_heads, num_blocks, heads_per_section)
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
    n, begin = kv.sequence_keys(lengths, p_begin, kv_len, i_b, i_k_head, valid)
    shift = n - n_q

    o_m = i_first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_m < n_q  # [BLOCK_M]
    o_m64 = o_m.to(tl.int64)
    b_pos = o_m + shift  # [BLOCK_M]
    slope, p_mask_rows, o_dropout_head = None, None, None
    if slopes is not None:
        slope = tl.load(slopes.ptr + i_b * slopes.stride_b + i_head * slopes.stride_h)
    if mask is not None:
        # [BLOCK_M, 1]
        p_mask_head = mask.ptr + i_b * mask.stride_b + i_head * mask.stride_h
        p_mask_rows = (p_mask_head + o_m64 * mask.stride_m)[:, None]
    if p_seed is not None:
        o_dropout_head = tl.zeros([BLOCK_M], tl.int32) + (i_b * num_heads + i_head).to(tl.int32)

    i_row = kv.first_row(p_q_offsets, i_b, i_head, i_token, num_heads, num_tokens)
    b_lse = load_lse(p_lse + i_row + o_m64, m_rows)  # [BLOCK_M]
    b_delta = tl.load(p_delta + i_row + o_m64, mask=m_rows, other=0.0)  # [BLOCK_M]
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
    o_token = i_token + o_m64
    p_dout_rows = kv.pointers(dout, i_b, i_head, o_token)
    p_q_rows = kv.pointers(q, i_b, i_head, o_token)
    if not D_CHUNKED:
        b_q = kv.load_rows(p_q_rows, m_rows, DIMS.D, DIMS.BLOCK_D, True)
    if not DV_CHUNKED:
        b_dout = kv.load_rows(p_dout_rows, m_rows, DIMS.DV, DIMS.BLOCK_DV, True)
    i_slot = tl.cast(begin, tl.int64)
    k_head = kv.rows_of_head(keys.rows, i_b, i_k_head, i_slot)
    v_head = kv.rows_of_head(values.rows, i_b, i_v_head, i_slot)

    window = Window(window_left, window_right)
    start, inner_start, inner_stop, stop = common.visible_keys(
        i_first, i_last, shift, n, window, BLOCK_N
    )
    b_dq = tl.zeros([BLOCK_M, DIMS.BLOCK_D], tl.float32)
    # Over the keys: dS before the cap's derivative, P * distance and dS * distance.
    b_ds_sum = tl.zeros([BLOCK_M], tl.float32)
    b_distance_sum = tl.zeros([BLOCK_M], tl.float32)
    b_ds_distance_sum = tl.zeros([BLOCK_M], tl.float32)
    o_block = tl.arange(0, BLOCK_N)
    for part in tl.static_range(
        common.LEFT_EDGE if window.left is not None else common.INNER, common.RIGHT_EDGE + 1
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
            p_k_rows = kv.row_pointers(k_head, 0, o_n64, False)
            p_v_rows = kv.row_pointers(v_head, 0, o_n64, False)
            b_k = kv.load_rows(p_k_rows, m_n, DIMS.D, DIMS.BLOCK_D, edge, i_col)
            if not DV_CHUNKED:
                b_v = kv.load_rows(p_v_rows, m_n, DIMS.DV, DIMS.BLOCK_DV, edge)
            # [BLOCK_M, BLOCK_N]
            if D_CHUNKED:
                b_qk = row_products(
                    p_q_rows, m_rows, p_k_rows, m_n, DIMS.D, DIMS.BLOCK_D, BLOCK_M, BLOCK_N
                )
            else:
                b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_capped = common.cap_scores(b_qk, scale, log2_scale, softcap)
            b_score = common.bias_and_mask(
                b_capped,
                o_n[None, :],
                b_pos[:, None],
                m_rows[:, None],
                slope,
                mask,
                p_mask_rows,
                n,
                window,
                edge,
            )
            b_p = probabilities(b_score, log2_scale, b_lse[:, None], b_k.dtype == tl.float32)
            m_keep = None
            if p_seed is not None:
                m_keep = keep_tile(
                    p_seed, i_n, o_m, o_dropout_head, dropout_threshold, BLOCK_M, BLOCK_N
                )
            if DV_CHUNKED:
                b_dp = row_products(
                    p_dout_rows, m_rows, p_v_rows, m_n, DIMS.DV, DIMS.BLOCK_DV, BLOCK_M, BLOCK_N
                )
            else:
                b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
            b_dp = through_dropout(b_dp, m_keep, dropout_scale)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if HAS_SUMS:
                b_ds_sum += tl.sum(b_ds, 1)
            if p_dslopes is not None:
                b_distance = tl.abs(b_pos[:, None] - o_n[None, :]).to(tl.float32)
                b_distance_sum += tl.sum(b_p * b_distance, 1)
                b_ds_distance_sum += tl.sum(b_ds * b_distance, 1)
            b_ds = through_cap(b_ds, b_capped, softcap)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    b_dq = tl.where(valid, b_dq * scale, float("nan"))
    p_dq_rows = kv.pointers(dq, i_b, i_head, o_token)
    common.store_rows(p_dq_rows, b_dq, m_rows, DIMS.D, DIMS.BLOCK_D, i_col)
    if HAS_SUMS:
        b_error = b_ds_sum
        if p_sinks is not None:
            b_error -= tl.exp(tl.load(p_sinks + i_head) - b_lse) * b_delta
        if p_dlse is not None:
            b_error -= tl.load(p_dlse + i_row + o_m64, mask=m_rows, other=0.0)
        m_first = m_rows & (i_col == 0)  # each row's sum is stored once
        tl.store(p_exact_delta + i_row + o_m64, b_delta + b_error, mask=m_first)
    if p_dslopes is not None:
        b_dslope = b_error * b_distance_sum - b_ds_distance_sum
        b_dslope = tl.where(b_lse < float("inf"), b_dslope, 0.0)
        p_dslope = p_dslopes + (i_b * num_heads + i_head) * num_blocks + i_block
        tl.store(p_dslope, tl.sum(b_dslope, 0), mask=i_col == 0)
