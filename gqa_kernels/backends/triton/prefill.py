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

from . import common


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
    ]
)
def prefill_kernel(
    p_q,  # [B, Hq, Sq, D]
    p_k,  # [B, Hk, Sk, D]
    p_v,  # [B, Hv, Sk, Dv]
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]
    p_slopes,  # [B, Hq] fp32 or None
    p_sinks,  # [Hq] fp32 or None
    p_mask,  # [B, Hq, Sq, Sk] uint8 or floating, or None
    p_lengths,  # [B, Hk] int32 or None
    p_seed,  # int64 [2] dropout seed and offset, or None
    p_out,  # [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous
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
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq
    kv_len,  # Sk
    num_blocks,  # ceil(Sq / BLOCK_M)
    heads_per_section,
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
):
    i_b, i_sorted, i_block = find_query_block(num_heads, num_blocks, heads_per_section)

    # Heads of the tile, through the plan.
    i_head = tl.load(p_plan + i_sorted).to(tl.int64)
    i_k_head = tl.load(p_plan + num_heads + i_sorted).to(tl.int64)
    i_v_head = tl.load(p_plan + 2 * num_heads + i_sorted).to(tl.int64)
    num_valid = tl.load(p_plan + 3 * num_heads + num_groups)
    valid = i_sorted < num_valid

    # Keys of the sequence; none for a head without a KV head.
    n = kv_len
    if HAS_LENGTHS:
        p_length = p_lengths + i_b * stride_lengths_b + i_k_head * stride_lengths_h
        n = tl.minimum(tl.maximum(tl.load(p_length, mask=valid, other=0), 0), kv_len)
    n = tl.where(valid, n, 0)
    shift = n - q_len

    # Rows of the tile: the query tokens of one block.
    i_first = i_block * BLOCK_M
    i_last = tl.minimum(i_first + BLOCK_M, q_len) - 1
    o_m = i_first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_m < q_len  # [BLOCK_M]
    o_m64 = o_m.to(tl.int64)
    b_pos = o_m + shift  # [BLOCK_M]
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
    p_q_rows = p_q + i_b * stride_qb + i_head * stride_qh + o_m64 * stride_qm
    b_q = common.load_rows(p_q_rows, m_rows, HEAD_DIM, BLOCK_D, True)

    start, inner_start, inner_stop, stop = common.visible_keys(
        i_first, i_last, shift, n, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    b_acc, b_sum, b_max = common.attend(
        b_q,
        p_k + i_b * stride_kb + i_k_head * stride_kh,
        p_v + i_b * stride_vb + i_v_head * stride_vh,
        stride_kn,
        stride_vn,
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
    )

    if HAS_SINKS:
        b_sum, b_max, b_factor = common.add_sink(b_sum, b_max, tl.load(p_sinks + i_head))
        b_acc = b_acc * b_factor[:, None]
    b_out = b_acc * common.normaliser(b_sum)[:, None]
    if HAS_DROPOUT:
        b_out = b_out * dropout_scale
    b_lse = common.log_sum_exp(b_sum, b_max)
    p_out_rows = p_out + i_b * stride_ob + i_head * stride_oh + o_m64 * stride_om
    p_lse_rows = p_lse + (i_b * num_heads + i_head) * q_len + o_m64
    b_out = tl.where(valid, b_out, float("nan"))
    tl.store(p_lse_rows, tl.where(valid, b_lse, float("nan")), mask=m_rows)
    common.store_rows(p_out_rows, b_out, m_rows, VALUE_DIM, BLOCK_DV)
