"""Decode: split-KV attention with the query heads of a group packed into the rows of one tile.

Grid    one program per (part, row tile, slice of the columns of V and O), flattened,
        slices fastest, then row tiles. There is one slice up to Dv 256. A row tile is up to BLOCK_M
        of the q_len * group_size rows of one group; the number of row tiles is the most that any
        head map of this shape can need, so the grid depends on shapes only.
        A part is a split of a sequence's keys. Without lengths, all sequences have as many splits;
        with lengths, parts have about equally many keys (parts.py), and surplus parts exit at once.
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
from .arguments import Source, TileRows, Window
from .parts import find_part


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
        "num_tokens",
        "num_pages",
        "num_tiles",
        "num_splits",
        "batch",
        "num_lengths",
        "even_parts",
        "most_blocks",
        "window_left",
        "window_right",
        "dropout_threshold",
    ]
)
def decode_kernel(
    q,  # Rows [B, Hq, Sq, D]; packed [1, Hq, tokens, D], likewise the output
    keys,  # Stored [B, Hk, Sk, D]; with a page table [P, Hk, PAGE_SIZE, D]
    values,  # Stored [B, Hv, Sk, Dv]; likewise
    out,  # Rows [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous; packed [1, Hq, tokens]
    p_row_max,  # likewise, the largest score of each row, or None
    partial,  # Partial, or None with one split
    p_parts,  # [B, 2] int32: first part and number of parts, written; None if all have as many
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
    num_tiles,
    num_splits,  # of each sequence, without p_parts
    batch,  # B; it and the next three only with p_parts, see parts.py
    num_lengths,
    even_parts,
    most_blocks,
    scale,
    log2_scale,  # scale * log2(e) if nothing else changes the scores, else None
    softcap,  # or None
    window_left,  # or None
    window_right,  # or None
    dropout_threshold,  # or None
    dropout_scale,  # 1 / (1 - p)
    DIMS,  # Dims
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Program id -> sequence, split, row tile -> group and rows.
    i_program, i_v_col = common.program_slice(DIMS.DV, DIMS.BLOCK_DV)
    i_tile = i_program % num_tiles
    i_part = i_program // num_tiles
    if p_parts is not None:
        i_b, i_split, num_splits = find_part(
            lengths, i_part, batch, num_lengths, kv_len, even_parts, most_blocks, BLOCK_N
        )
        if i_b < 0:
            return
        if (i_tile == 0) & (i_split == 0) & (i_v_col == 0):
            tl.store(p_parts + 2 * i_b, i_part)
            tl.store(p_parts + 2 * i_b + 1, num_splits)
        i_b = i_b.to(tl.int64)
    else:
        i_split = i_part % num_splits
        i_b = (i_part // num_splits).to(tl.int64)
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
    n, begin = kv.sequence_keys(lengths, p_begin, kv_len, i_b, i_k_head, valid)
    source = Source(i_b, i_k_head, i_v_head, n, begin, i_v_col)
    shift = n - n_q

    # Rows of the tile, token by token, the group's heads inside: row = token * group_size + head.
    o_row = i_first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_row < num_rows  # [BLOCK_M]
    o_m = o_row // group_size  # [BLOCK_M]
    o_m64 = o_m.to(tl.int64)
    o_sorted = i_sorted_first + o_row % group_size  # [BLOCK_M]
    o_head = tl.load(p_plan + o_sorted, mask=m_rows, other=0).to(tl.int64)  # [BLOCK_M]
    b_slope, p_mask, o_dropout_head = None, None, None
    if slopes is not None:
        p_slope_rows = slopes.ptr + i_b * slopes.stride_b + o_head * slopes.stride_h
        b_slope = tl.load(p_slope_rows, mask=m_rows, other=0.0)  # [BLOCK_M]
    if mask is not None:
        p_mask = mask.ptr + i_b * mask.stride_b + o_head * mask.stride_h + o_m64 * mask.stride_m
    if p_seed is not None:
        o_dropout_head = (i_b * num_heads + o_head).to(tl.int32)
    o_token = i_token + o_m64
    rows = TileRows(m_rows, o_m, o_token, o_head, b_slope, p_mask, o_dropout_head)

    i_first = i_first_row // group_size
    i_last = (tl.minimum(i_first_row + BLOCK_M, num_rows) - 1) // group_size
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
        (i_split, num_splits) if partial is not None else None,
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

    if p_seed is not None:
        b_acc = b_acc * dropout_scale
    m_first = m_rows & (i_v_col == 0)  # each row's numbers are stored once
    if partial is not None:
        # [BLOCK_M]
        o_partial = (i_part.to(tl.int64) * num_heads + o_sorted) * q_len + o_m64
        tl.store(partial.sum + o_partial, b_sum, mask=m_first)
        tl.store(partial.max + o_partial, b_max, mask=m_first)
        p_acc_rows = partial.acc + o_partial * DIMS.DV
        common.store_rows(p_acc_rows, b_acc, m_rows, DIMS.DV, DIMS.BLOCK_DV, i_v_col)
    else:
        o_row = kv.first_row(p_q_offsets, i_b, o_head, i_token, num_heads, num_tokens) + o_m64
        if p_row_max is not None:
            b_most = tl.where(valid, b_max * common.LN2, float("nan"))
            tl.store(p_row_max + o_row, b_most, mask=m_first)
        if p_sinks is not None:
            b_sink = tl.load(p_sinks + o_head, mask=m_rows, other=0.0)
            b_sum, b_max, b_factor = common.add_sink(b_sum, b_max, b_sink)
            b_acc = b_acc * b_factor[:, None]
        b_out = b_acc * common.normaliser(b_sum)[:, None]
        b_lse = common.log_sum_exp(b_sum, b_max)
        p_out_rows = kv.pointers(out, i_b, o_head, o_token)
        b_out = tl.where(valid, b_out, float("nan"))
        tl.store(p_lse + o_row, tl.where(valid, b_lse, float("nan")), mask=m_first)
        common.store_rows(p_out_rows, b_out, m_rows, DIMS.DV, DIMS.BLOCK_DV, i_v_col)
