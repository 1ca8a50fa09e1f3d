"""Key scores: the attention that each key gets from the last queries.

Grid    one program per (sequence, key head, block of BLOCK_N keys), flattened, blocks fastest.
Program keeps its block of K, and walks over the rows that count: the last query tokens, each with
        the heads that read the key head, packed into tiles of BLOCK_M rows as in decode. It
        recomputes their probabilities from the LSE, sums them in fp32, and writes each sum once: no
        atomics. So K is read once more, for the last queries only.
"""

import triton
import triton.language as tl

from . import common, kv
from .arguments import Window
from .backward_common import load_lse, probabilities


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_groups",
        "q_len",
        "kv_len",
        "num_tokens",
        "num_pages",
        "num_blocks",
        "num_queries",
        "window_left",
        "window_right",
    ]
)
def key_scores_kernel(
    q,  # Rows [B, Hq, Sq, D]; packed [1, Hq, tokens, D]
    keys,  # Stored [B, Hk, Sk, D]; with a page table [P, Hk, PAGE_SIZE, D]
    p_lse,  # [B, Hq, Sq] fp32, contiguous; packed [1, Hq, tokens]
    p_key_scores,  # [B, Hk, Sk] fp32, contiguous
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]; group g is key head g
    slopes,  # PerHead [B, Hq] fp32, or None
    mask,  # Mask, or None
    lengths,  # PerHead [B, Hk] int32, or None
    pages,  # Pages, or None
    p_begin,  # [B] int32, slot of the first key, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    num_heads,  # Hq
    num_groups,  # Hk
    q_len,  # Sq; of packed sequences the longest
    kv_len,  # Sk
    num_tokens,  # Sq; of packed sequences the sum
    num_pages,  # P
    num_blocks,  # ceil(Sk / BLOCK_N)
    num_queries,  # last queries of each sequence that count
    scale,
    log2_scale,  # scale * log2(e) if nothing else changes the scores, else None
    softcap,  # or None
    window_left,  # or None
    window_right,  # or None
    DIMS,  # Dims
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PAGED: tl.constexpr = pages is not None
    # Program id -> sequence, key head, key block.
    i_program = tl.program_id(0)
    i_block = i_program % num_blocks
    i_k_head = (i_program // num_blocks % num_groups).to(tl.int64)
    i_b = (i_program // num_blocks // num_groups).to(tl.int64)
    i_token, n_q = 0, q_len
    if p_q_offsets is not None:
        i_token, n_q = kv.packed_queries(p_q_offsets, i_b, q_len, num_tokens)
    p_offsets = p_plan + 3 * num_heads
    i_sorted_first = tl.load(p_offsets + i_k_head)
    group_size = tl.load(p_offsets + i_k_head + 1) - i_sorted_first
    n, begin = kv.sequence_keys(lengths, p_begin, kv_len, i_b, i_k_head, i_k_head >= 0)
    shift = n - n_q

    # The block of keys.
    i_first = i_block * BLOCK_N
    o_n = i_first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < n
    i_storage, i_slot = i_b, tl.cast(begin, tl.int64)
    if PAGED:  # the table says where each key lies
        i_storage, i_slot = 0, 0
        p_table = pages.ptr + i_b * pages.stride_b + i_k_head * pages.stride_h
        o_page, o_slot, m_readable = kv.locate(
            pages, p_table, num_pages, begin, i_first, o_n, m_n, BLOCK_N, p_begin is not None
        )
    else:
        o_page, o_slot, m_readable = 0, o_n.to(tl.int64), m_n
    k_rows = kv.rows_of_head(keys.rows, i_storage, i_k_head, i_slot)
    k_zero = None
    if keys.zero is not None:
        k_zero = kv.rows_of_head(keys.zero, i_storage, i_k_head, i_slot)
    if keys.FORMAT != kv.PLAIN:
        k_scale = kv.rows_of_head(keys.scale, i_storage, i_k_head, i_slot)
        b_scale = kv.load_per_row(k_scale, o_page, o_slot, m_readable, PAGED)  # [BLOCK_N]
    if DIMS.D <= DIMS.BLOCK_D:
        # [BLOCK_N, BLOCK_D]
        b_k = kv.load_stored(
            k_rows,
            k_zero,
            o_page,
            o_slot,
            m_readable,
            DIMS.D,
            DIMS.BLOCK_D,
            keys.FORMAT,
            PAGED,
            True,
        ).to(q.ptr.dtype.element_ty)

    i_first_query = tl.maximum(n_q - num_queries, 0)
    num_rows = group_size * (n_q - i_first_query)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    for i_row in tl.range(0, num_rows, BLOCK_M):
        # Rows of the tile, token by token, the group's heads inside.
        o_row = i_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        m_rows = o_row < num_rows
        o_m = i_first_query + o_row // group_size  # [BLOCK_M]
        o_m64 = o_m.to(tl.int64)
        o_sorted = i_sorted_first + o_row % group_size
        o_head = tl.load(p_plan + o_sorted, mask=m_rows, other=0).to(tl.int64)  # [BLOCK_M]
        p_q_rows = kv.pointers(q, i_b, o_head, i_token + o_m64)
        b_qk = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_col in tl.static_range(0, DIMS.D, DIMS.BLOCK_D):
            # [BLOCK_M, BLOCK_D], [BLOCK_N, BLOCK_D]
            b_q = kv.load_rows(p_q_rows, m_rows, DIMS.D, DIMS.BLOCK_D, True, i_col)
            if DIMS.D > DIMS.BLOCK_D:
                b_k = kv.load_stored(
                    k_rows,
                    k_zero,
                    o_page,
                    o_slot,
                    m_readable,
                    DIMS.D,
                    DIMS.BLOCK_D,
                    keys.FORMAT,
                    PAGED,
                    True,
                    i_col,
                ).to(q.ptr.dtype.element_ty)
            b_qk = tl.dot(b_q, tl.trans(b_k), b_qk, input_precision="ieee")
        if keys.FORMAT != kv.PLAIN:
            b_qk *= b_scale[None, :]
        b_score = common.cap_scores(b_qk, scale, log2_scale, softcap)
        b_slope, p_mask = None, None
        if slopes is not None:
            p_slope_rows = slopes.ptr + i_b * slopes.stride_b + o_head * slopes.stride_h
            b_slope = tl.load(p_slope_rows, mask=m_rows, other=0.0)[:, None]
        if mask is not None:
            p_mask = mask.ptr + i_b * mask.stride_b + o_head * mask.stride_h
            p_mask = (p_mask + o_m64 * mask.stride_m)[:, None]
        b_score = common.bias_and_mask(
            b_score,
            o_n[None, :],
            (o_m + shift)[:, None],
            m_rows[:, None],
            b_slope,
            mask,
            p_mask,
            n,
            Window(window_left, window_right),
            True,
        )
        o_lse = kv.first_row(p_q_offsets, i_b, o_head, i_token, num_heads, num_tokens) + o_m64
        b_lse = load_lse(p_lse + o_lse, m_rows)  # [BLOCK_M]
        b_p = probabilities(
            b_score, log2_scale, b_lse[:, None], q.ptr.dtype.element_ty == tl.float32
        )
        b_total += tl.sum(b_p, 0)

    p_row = p_key_scores + (i_b * num_groups + i_k_head) * kv_len
    tl.store(p_row + o_n, b_total, mask=o_n < kv_len)
