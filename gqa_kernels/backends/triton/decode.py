"""Decode: split-KV attention with the query heads of a group packed into the rows of one tile.

Grid    one program per (sequence, KV split, row tile), flattened, row tiles fastest. A row tile
        is up to BLOCK_M of the q_len * group_size rows of one group; the number of row tiles is
        the most that any head map of this shape can need, so the grid depends on shapes only.
Program finds its group and its first row from the plan's offsets (a surplus tile exits at once),
        gathers its query rows, and runs the online softmax over its share of the keys that these
        rows see. So each byte of K and V is read once per (sequence, group, split); a group of
        more than BLOCK_M rows takes neighbouring tiles, which share K and V through L2.
        With one split it writes the output and the LSE, otherwise its partial state
        (b_acc, b_sum, b_max), which combine.py merges.
        The tile of the heads whose map entry is out of range sees no keys and reads no K or V.

Source: Flash-Decoding for the splits and packed GQA rows (FlashAttention-3, arXiv 2407.08608),
generalised to groups of any size by a lookup in the plan; own code.
"""

import triton
import triton.language as tl

from . import common, kv


@triton.jit
def find_row_tile(
    p_offsets, i_tile, num_groups, q_len, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(group, first row in the group) of a row tile; group > num_groups for a surplus tile.

    Group `num_groups` holds the heads without a KV head.
    """
    o_g = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    m_g = o_g <= num_groups
    b_start = tl.load(p_offsets + o_g, mask=m_g, other=0)
    b_stop = tl.load(p_offsets + o_g + 1, mask=m_g, other=0)
    b_tiles = tl.cdiv((b_stop - b_start) * q_len, BLOCK_M)
    m_before = m_g & (tl.cumsum(b_tiles, 0) <= i_tile)  # groups whose tiles all come earlier
    i_group = tl.sum(m_before.to(tl.int32), 0)
    i_first_tile = tl.sum(tl.where(m_before, b_tiles, 0), 0)
    return i_group, (i_tile - i_first_tile) * BLOCK_M


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_groups",
        "q_len",
        "kv_len",
        "num_tiles",
        "num_splits",
        "window_left",
        "window_right",
        "dropout_threshold",
        "stride_lse_b",
        "stride_lse_h",
        "num_pages",
        "num_tokens",
    ]
)
def decode_kernel(
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
    p_partial_acc,  # [B, Hq (sorted), Sq, num_splits, Dv] fp32, or None with one split
    p_partial_sum,  # [B, Hq (sorted), Sq, num_splits] fp32, or None
    p_partial_max,  # [B, Hq (sorted), Sq, num_splits] fp32, or None
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
    num_tiles,
    num_splits,
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
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
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
    # Program id -> sequence, split, row tile -> group and rows.
    i_program = tl.program_id(0)
    i_tile = i_program % num_tiles
    i_split = i_program // num_tiles % num_splits
    i_b = (i_program // num_tiles // num_splits).to(tl.int64)
    p_offsets = p_plan + 3 * num_heads
    i_token, n_q = 0, q_len
    if p_q_offsets is not None:
        i_token, n_q = kv.packed_queries(p_q_offsets, i_b, q_len, num_tokens)
    i_group, i_first_row = find_row_tile(p_offsets, i_tile, num_groups, n_q, BLOCK_G, BLOCK_M)
    if i_group > num_groups:
        return
    valid = i_group < num_groups
    i_sorted_first = tl.load(p_offsets + i_group)
    group_size = tl.load(p_offsets + i_group + 1) - i_sorted_first
    num_rows = group_size * n_q
    i_k_head = tl.load(p_plan + num_heads + i_sorted_first).to(tl.int64)
    i_v_head = tl.load(p_plan + 2 * num_heads + i_sorted_first).to(tl.int64)

    # Keys of the sequence; none for heads without a KV head.
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

    # Rows of the tile, token by token, the group's heads inside: row = token * group_size + head.
    o_row = i_first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_row < num_rows  # [BLOCK_M]
    o_m = o_row // group_size  # [BLOCK_M]
    o_m64 = o_m.to(tl.int64)
    o_sorted = i_sorted_first + o_row % group_size  # [BLOCK_M]
    o_head = tl.load(p_plan + o_sorted, mask=m_rows, other=0).to(tl.int64)  # [BLOCK_M]
    b_pos = o_m + shift  # [BLOCK_M]
    b_slope = None
    if HAS_ALIBI:
        p_slope_rows = p_slopes + i_b * stride_slopes_b + o_head * stride_slopes_h
        b_slope = tl.load(p_slope_rows, mask=m_rows, other=0.0)  # [BLOCK_M]
    p_mask_rows = None
    if MASK_KIND != common.NO_MASK:
        # [BLOCK_M]
        p_mask_rows = p_mask + i_b * stride_mask_b + o_head * stride_mask_h + o_m64 * stride_mask_m

    o_dropout_head = None
    if HAS_DROPOUT:
        o_dropout_head = (i_b * num_heads + o_head).to(tl.int32)  # [BLOCK_M]

    # [BLOCK_M, BLOCK_D]
    p_q_rows = p_q + i_b * stride_qb + o_head * stride_qh + (i_token + o_m64) * stride_qm
    b_q = kv.load_rows(p_q_rows, m_rows, HEAD_DIM, BLOCK_D, True)

    # This split's share of the key blocks that the tile's tokens see.
    i_first = i_first_row // group_size
    i_last = (tl.minimum(i_first_row + BLOCK_M, num_rows) - 1) // group_size
    start, inner_start, inner_stop, stop = common.visible_keys(
        i_first, i_last, shift, n, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if SPLIT:
        blocks_per_split = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), BLOCK_N), num_splits)
        split_start = start + i_split * blocks_per_split * BLOCK_N
        split_stop = split_start + blocks_per_split * BLOCK_N
        inner_start = tl.minimum(tl.maximum(inner_start, split_start), split_stop)
        inner_stop = tl.minimum(tl.maximum(inner_stop, split_start), split_stop)
        start = split_start
        stop = tl.minimum(stop, split_stop)

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

    if HAS_DROPOUT:
        b_acc = b_acc * dropout_scale
    if SPLIT:
        # [BLOCK_M]
        o_partial = ((i_b * num_heads + o_sorted) * q_len + o_m64) * num_splits + i_split
        tl.store(p_partial_sum + o_partial, b_sum, mask=m_rows)
        tl.store(p_partial_max + o_partial, b_max, mask=m_rows)
        common.store_rows(p_partial_acc + o_partial * VALUE_DIM, b_acc, m_rows, VALUE_DIM, BLOCK_DV)
    else:
        if HAS_SINKS:
            b_sink = tl.load(p_sinks + o_head, mask=m_rows, other=0.0)
            b_sum, b_max, b_factor = common.add_sink(b_sum, b_max, b_sink)
            b_acc = b_acc * b_factor[:, None]
        b_out = b_acc * common.normaliser(b_sum)[:, None]
        b_lse = common.log_sum_exp(b_sum, b_max)
        o_m64 += i_token
        p_out_rows = p_out + i_b * stride_ob + o_head * stride_oh + o_m64 * stride_om
        p_lse_rows = p_lse + i_b * stride_lse_b + o_head * stride_lse_h + o_m64
        b_out = tl.where(valid, b_out, float("nan"))
        tl.store(p_lse_rows, tl.where(valid, b_lse, float("nan")), mask=m_rows)
        common.store_rows(p_out_rows, b_out, m_rows, VALUE_DIM, BLOCK_DV)
