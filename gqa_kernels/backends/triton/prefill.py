"""Prefill: forward attention with one query head per tile.

Grid    one program per (sequence, query head, block of BLOCK_M query tokens), flattened.
        Query heads are taken in the plan's order, sorted by group, in sections whose K and V fit
        the L2 cache; inside a section, block by block from the last block to the first. So heads
        of one group run at the same time and meet in L2, and with causal masking the longest
        work starts first.
Program reads its query block once, walks over the key blocks that some row can see with an
        online softmax, and writes its rows of the output and of the LSE. Blocks that every row
        sees in full take no masking code.
        A head whose map entry is out of range sees no keys, reads no K or V, and gives NaN.

Source: FlashAttention-2 (arXiv 2307.08691) for the loop order; own code.
"""

import triton
import triton.language as tl

from . import common, kv


@triton.jit
def find_query_block(num_heads, num_blocks, heads_per_section):
    """(sequence, place of the head in the plan, block of query tokens) of this program."""
    i_program = tl.program_id(0)
    programs_per_sequence = num_heads * num_blocks
    i_b = (i_program // programs_per_sequence).to(tl.int64)
    i_rest = i_program % programs_per_sequence
    programs_per_section = heads_per_section * num_blocks
    i_section_head = i_rest // programs_per_section * heads_per_section
    i_rest = i_rest % programs_per_section
    section_heads = tl.minimum(heads_per_section, num_heads - i_section_head)
    return i_b, i_section_head + i_rest % section_heads, num_blocks - 1 - i_rest // section_heads


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
        "stride_lse_b",
        "stride_lse_h",
        "num_pages",
        "num_tokens",
    ]
)
def prefill_kernel(
    p_q,  # [B, Hq, Sq, D]; packed [1, Hq, tokens, D], likewise the output
    p_k,  # [B, Hk, Sk, D]; with a page table [P, Hk, PAGE_SIZE, D]
    p_v,  # [B, Hv, Sk, Dv]; likewise
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]
    p_slopes,  # [B, Hq] fp32 or None
    p_sinks,  # [Hq] fp32 or None
    p_mask,  # [B, Hq, Sq, Sk] uint8 or floating, or None
    p_lengths,  # [B, Hk] int32 or None
    p_seed,  # int64 [2] dropout seed and offset, or None
    p_table,  # [B, Hk, max_pages] int32 page ids or None
    p_begin,  # [B] int32, slot of the first key, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    p_k_scale,  # [P, Hk, PAGE_SIZE] fp32 or None, with a page table; else [B, Hk, Sk]
    p_v_scale,
    p_k_zero,
    p_v_zero,
    p_out,  # [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32; packed [1, Hq, tokens]
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_slopes_b,
    stride_slopes_h,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_lengths_b,
    stride_lengths_h,
    stride_table_b,
    stride_table_h,
    stride_table_p,
    stride_k_scale_p,
    stride_k_scale_h,
    stride_k_scale_n,
    stride_v_scale_p,
    stride_v_scale_h,
    stride_v_scale_n,
    stride_k_zero_p,
    stride_k_zero_h,
    stride_k_zero_n,
    stride_v_zero_p,
    stride_v_zero_h,
    stride_v_zero_n,
    stride_lse_b,
    stride_lse_h,
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq; of packed sequences the longest
    kv_len,  # Sk
    num_blocks,  # ceil(Sq / BLOCK_M)
    heads_per_section,
    num_pages,  # P
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
    HAS_SINKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASK_KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    i_b, i_sorted, i_block = find_query_block(num_heads, num_blocks, heads_per_section)

    # Rows of the tile: the query tokens of one block.
    i_token, n_q = 0, q_len
    i_first = i_block * BLOCK_M
    if p_q_offsets is not None:
        i_token, n_q = kv.packed_queries(p_q_offsets, i_b, q_len, num_tokens)
        if i_first >= n_q:
            return
    i_last = tl.minimum(i_first + BLOCK_M, n_q) - 1
    o_m = i_first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_m < n_q  # [BLOCK_M]
    o_m64 = o_m.to(tl.int64)

    # Heads of the tile, through the plan.
    i_head = tl.load(p_plan + i_sorted).to(tl.int64)
    i_k_head = tl.load(p_plan + num_heads + i_sorted).to(tl.int64)
    i_v_head = tl.load(p_plan + 2 * num_heads + i_sorted).to(tl.int64)
    num_valid = tl.load(p_plan + 3 * num_heads + num_groups)
    valid = i_sorted < num_valid

    # Keys of the sequence; none for a head without a KV head.
    n, begin, i_slot = kv_len, 0, 0
    if p_begin is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_begin + i_b), 0), kv_len)
        i_slot = begin.to(tl.int64)
        n = kv_len - begin
    if HAS_LENGTHS:
        p_length = p_lengths + i_b * stride_lengths_b + i_k_head * stride_lengths_h
        n = tl.minimum(tl.maximum(tl.load(p_length, mask=valid, other=0), 0), n)
    n = tl.where(valid, n, 0)
    shift = n - n_q

    # Where they lie: the tuples of kv.py.
    i_storage, p_table_row = i_b, p_table
    if PAGED:
        i_storage, i_slot = 0, 0
        p_table_row = p_table + i_b * stride_table_b + i_k_head * stride_table_h
    table = (p_table_row, stride_table_p, num_pages, begin)
    keys = kv.rows_of_head(
        p_k,
        (stride_kb, stride_kh, stride_kn),
        p_k_scale,
        (stride_k_scale_p, stride_k_scale_h, stride_k_scale_n),
        p_k_zero,
        (stride_k_zero_p, stride_k_zero_h, stride_k_zero_n),
        i_storage,
        i_k_head,
        i_slot,
        FORMAT,
    )
    values = kv.rows_of_head(
        p_v,
        (stride_vb, stride_vh, stride_vn),
        p_v_scale,
        (stride_v_scale_p, stride_v_scale_h, stride_v_scale_n),
        p_v_zero,
        (stride_v_zero_p, stride_v_zero_h, stride_v_zero_n),
        i_storage,
        i_v_head,
        i_slot,
        FORMAT,
    )

    b_pos = o_m + shift  # [BLOCK_M], query positions among the keys
    b_slope = None
    if HAS_ALIBI:
        slope = tl.load(p_slopes + i_b * stride_slopes_b + i_head * stride_slopes_h)
        b_slope = tl.zeros([BLOCK_M], tl.float32) + slope
    p_mask_rows = None
    if MASK_KIND != common.NO_MASK:
        # [BLOCK_M]
        p_mask_rows = p_mask + i_b * stride_mask_b + i_head * stride_mask_h + o_m64 * stride_mask_m

    o_dropout_head = None
    if HAS_DROPOUT:
        o_dropout_head = tl.zeros([BLOCK_M], tl.int32) + (i_b * num_heads + i_head).to(tl.int32)

    # [BLOCK_M, BLOCK_D]
    p_q_rows = p_q + i_b * stride_qb + i_head * stride_qh + (i_token + o_m64) * stride_qm
    b_q = kv.load_rows(p_q_rows, m_rows, HEAD_DIM, BLOCK_D, True)

    start, inner_start, inner_stop, stop = common.visible_keys(
        i_first, i_last, shift, n, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    b_acc, b_sum, b_max = common.attend(
        b_q,
        table,
        keys,
        values,
        start,
        inner_start,
        inner_stop,
        stop,
        b_pos,
        m_rows,
        b_slope,
        p_mask_rows,
        stride_mask_n,
        p_seed,
        o_m,
        o_dropout_head,
        dropout_threshold,
        n,
        scale,
        softcap,
        window_left,
        window_right,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_M,
        BLOCK_N,
        HAS_LEFT,
        HAS_RIGHT,
        HAS_SOFTCAP,
        HAS_ALIBI,
        HAS_DROPOUT,
        MASK_KIND,
        FORMAT,
        p_k_zero is not None,
        p_v_zero is not None,
        PAGED,
        PAGE_SIZE,
        p_begin is not None,
    )

    if HAS_SINKS:
        b_sum, b_max, b_factor = common.add_sink(b_sum, b_max, tl.load(p_sinks + i_head))
        b_acc = b_acc * b_factor[:, None]
    b_out = b_acc * common.normaliser(b_sum)[:, None]
    if HAS_DROPOUT:
        b_out = b_out * dropout_scale
    b_lse = common.log_sum_exp(b_sum, b_max)
    o_m64 += i_token
    p_out_rows = p_out + i_b * stride_ob + i_head * stride_oh + o_m64 * stride_om
    p_lse_rows = p_lse + i_b * stride_lse_b + i_head * stride_lse_h + o_m64
    b_out = tl.where(valid, b_out, float("nan"))
    tl.store(p_lse_rows, tl.where(valid, b_lse, float("nan")), mask=m_rows)
    common.store_rows(p_out_rows, b_out, m_rows, VALUE_DIM, BLOCK_DV)
