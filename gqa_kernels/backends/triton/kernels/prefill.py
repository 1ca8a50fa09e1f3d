"""Prefill: forward attention with one query head per tile.

Grid    one program per (sequence, query head, block of BLOCK_M query tokens, slice of the columns
        of V and O), flattened, slices fastest. There is one slice up to Dv 256.
        Query heads come in the plan's order, sorted by group, in sections whose K and V fit the
        L2 cache. Inside a section, programs go block by block from the last block to the first.
        So heads of one group run at the same time and share K and V in L2, and with causal
        masking the longest work starts first.
Program reads its query block once, walks over the key blocks that some row can see with an
        online softmax, and writes its rows of the output and of the LSE. Blocks that every row
        sees in full run without masking code.
        A head whose map entry is out of range reads no K or V, and its rows become NaN.

Source: FlashAttention-2 (arXiv 2307.08691) for the loop order; own code.
"""

import triton
import triton.language as tl

from . import common, kv
from .arguments import Source, TileRows, Window


@triton.jit
def find_query_block(i_program, num_heads, num_blocks, heads_per_section):
    """(sequence, place of the head in the plan, block of query tokens) of a program."""
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
        "num_tokens",
        "num_pages",
        "num_blocks",
        "heads_per_section",
        "window_left",
        "window_right",
        "dropout_threshold",
    ]
)
def prefill_kernel(
    q,  # Rows [B, Hq, Sq, D]; packed [1, Hq, tokens, D], likewise the output
    keys,  # Stored [B, Hk, Sk, D]; with a page table [P, Hk, PAGE_SIZE, D]
    values,  # Stored [B, Hv, Sk, Dv]; likewise
    out,  # Rows [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous; packed [1, Hq, tokens]
    p_row_max,  # likewise, the largest score of each row, or None
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]
    slopes,  # PerHead [B, Hq] fp32, or None
    p_sinks,  # [Hq] fp32, or None
    mask,  # Mask, or None
    lengths,  # PerHead [B, Hk] int32, or None
    pages,  # Pages, or None
    p_begin,  # [B] int32, slot of the first key, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    p_seed,  # int64 [2] dropout seed and offset, or None
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq; of packed sequences the longest
    kv_len,  # Sk
    num_tokens,  # Sq; of packed sequences the sum
    num_pages,  # P
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
    i_program, i_v_col = common.program_slice(DIMS.DV, DIMS.BLOCK_DV)
    i_b, i_sorted, i_block = find_query_block(i_program, num_heads, num_blocks, heads_per_section)

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
    n, begin = kv.sequence_keys(lengths, p_begin, kv_len, i_b, i_k_head, valid)
    source = Source(i_b, i_k_head, i_v_head, n, begin, i_v_col)
    shift = n - n_q

    b_slope, p_mask, o_dropout_head = None, None, None
    if slopes is not None:
        slope = tl.load(slopes.ptr + i_b * slopes.stride_b + i_head * slopes.stride_h)
        b_slope = tl.zeros([BLOCK_M], tl.float32) + slope
    if mask is not None:
        p_mask = mask.ptr + i_b * mask.stride_b + i_head * mask.stride_h + o_m64 * mask.stride_m
    if p_seed is not None:
        o_dropout_head = tl.zeros([BLOCK_M], tl.int32) + (i_b * num_heads + i_head).to(tl.int32)
    o_token = i_token + o_m64
    rows = TileRows(m_rows, o_m, o_token, i_head, b_slope, p_mask, o_dropout_head)

    # [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    b_acc, b_sum, b_max = common.attend(
        q,
        rows,
        keys,
        values,
        pages,
        source,
        num_pages,
        (i_first, i_last, shift),
        None,
        Window(window_left, window_right),
        mask,
        scale,
        log2_scale,
        softcap,
        p_seed,
        dropout_threshold,
        DIMS,
        BLOCK_M,
        BLOCK_N,
        p_begin is not None,
    )

    m_first = m_rows & (i_v_col == 0)  # each row's numbers are stored once
    o_row = kv.first_row(p_q_offsets, i_b, i_head, i_token, num_heads, num_tokens) + o_m64
    if p_row_max is not None:
        tl.store(p_row_max + o_row, tl.where(valid, b_max * common.LN2, float("nan")), mask=m_first)
    if p_sinks is not None:
        b_sum, b_max, b_factor = common.add_sink(b_sum, b_max, tl.load(p_sinks + i_head))
        b_acc = b_acc * b_factor[:, None]
    b_out = b_acc * common.normaliser(b_sum)[:, None]
    if p_seed is not None:
        b_out = b_out * dropout_scale
    b_lse = common.log_sum_exp(b_sum, b_max)
    p_out_rows = kv.pointers(out, i_b, i_head, o_token)
    b_out = tl.where(valid, b_out, float("nan"))
    tl.store(p_lse + o_row, tl.where(valid, b_lse, float("nan")), mask=m_first)
    common.store_rows(p_out_rows, b_out, m_rows, DIMS.DV, DIMS.BLOCK_DV, i_v_col)
