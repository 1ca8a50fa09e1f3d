"""Backward, gradients of K and V: the sum over a group's heads is taken inside the kernel.

Grid    one program per (group, sequence, block of BLOCK_N keys), flattened, blocks fastest; groups
        come largest first, in the order of p_order, so that the longest work starts first
        (with causal masking most queries see the first blocks).
Program keeps its block of K and V, and walks over the query heads of its group, for each over the
        blocks of query tokens that see its keys: recomputes P from the LSE, and adds up
        dV += P^T dO and dK += dS^T Q in fp32 registers. Each element is written once: no atomics,
        no expanded gradients, bitwise repeatable. A group without heads writes zeros.
        If V has a head map of its own (not SHARED), one launch over the groups of K writes dK
        and another over those of V writes dV; each then loads the other tile for every head.
        Above head dim 256 there are two launches as well, with one program per slice of the
        columns that they write, slices fastest.
        With packed sequences, a program writes the keys of its own sequence and no others.

Tiles are keys x queries: P^T and dS^T are then left operands as they come out of the products.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, the loops swapped; own code.
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
from .dropout import keep_tile_keys_first


@triton.jit
def seeing_queries(
    i_first,  # first and last key of the tile
    i_last,
    shift,  # position of query token 0 among the keys: n - Sq
    n,  # keys of the sequence
    q_len,
    window,
    BLOCK_M: tl.constexpr,
):
    """Queries [start, stop) of which some see a key of the tile; start is a multiple of BLOCK_M."""
    start = 0
    stop = tl.where(i_first < n, q_len, 0)
    if window.right is not None:
        start = tl.maximum(i_first - shift - window.right, 0) // BLOCK_M * BLOCK_M
    if window.left is not None:
        stop = tl.minimum(stop, i_last - shift + window.left + 1)
    return start, stop


@triton.jit(
    do_not_specialize=[
        "batch",
        "num_heads",
        "num_groups",
        "q_len",
        "kv_len",
        "num_tokens",
        "num_blocks",
        "window_left",
        "window_right",
        "dropout_threshold",
    ]
)
def backward_kv_kernel(
    q,  # Rows [B, Hq, Sq, D]; packed [1, Hq, tokens, D], likewise all of queries
    keys,  # Stored [B, Hk, Sk, D]; packed [1, Hk, tokens, D], likewise all of keys
    values,  # Stored [B, Hv, Sk, Dv]
    dout,  # Rows [B, Hq, Sq, Dv]
    p_lse,  # [B, Hq, Sq] fp32, contiguous
    p_delta,  # [B, Hq, Sq] fp32, contiguous
    dk,  # Rows [B, Hk, Sk, D], or None
    dv,  # Rows [B, Hv, Sk, Dv], or None
    p_plan,  # perm [Hq], k_head [Hq], v_head [Hq], offsets [G + 2]; group g is KV head g
    p_order,  # [G] int32, groups, largest first
    slopes,  # PerHead [B, Hq] fp32, or None
    mask,  # Mask, or None
    lengths,  # PerHead [B, Hk] int32, or None
    p_begin,  # [B] int32, first key of packed sequences, or None
    p_q_offsets,  # [B + 1] int32, tokens of packed sequences, or None
    p_seed,  # int64 [2] dropout seed and offset, or None
    batch,  # B
    num_heads,  # Hq
    num_groups,  # G
    q_len,  # Sq; of packed sequences the longest
    kv_len,  # Sk; of packed sequences the sum
    num_tokens,  # Sq; of packed sequences the sum
    num_blocks,  # ceil(Sk / BLOCK_N)
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
    SHARED: tl.constexpr,  # K and V are grouped alike
):
    # Program id -> slice of columns, group, sequence, key block.
    D_CHUNKED: tl.constexpr = DIMS.D > DIMS.BLOCK_D
    DV_CHUNKED: tl.constexpr = DIMS.DV > DIMS.BLOCK_DV
    i_d_col, i_dv_col = 0, 0
    if dk is not None:
        i_program, i_d_col = common.program_slice(DIMS.D, DIMS.BLOCK_D)
    else:
        i_program, i_dv_col = common.program_slice(DIMS.DV, DIMS.BLOCK_DV)
    i_block = i_program % num_blocks
    i_b = (i_program // num_blocks % batch).to(tl.int64)
    i_group = tl.load(p_order + i_program // num_blocks // batch).to(tl.int64)
    p_offsets = p_plan + 3 * num_heads
    i_sorted_first = tl.load(p_offsets + i_group)
    i_sorted_stop = tl.load(p_offsets + i_group + 1)

    # Queries and slots of the sequence.
    i_token, n_q = 0, q_len
    if p_q_offsets is not None:
        i_token, n_q = kv.packed_queries(p_q_offsets, i_b, q_len, num_tokens)
    begin, n_slots = 0, kv_len
    if p_begin is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_begin + i_b), 0), kv_len)
        n_slots = tl.minimum(tl.load(lengths.ptr + i_b * lengths.stride_b), kv_len - begin)

    i_first = i_block * BLOCK_N
    o_n = i_first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_n64 = o_n.to(tl.int64) + begin
    m_slots = o_n < n_slots
    o_block = tl.arange(0, BLOCK_M)
    window = Window(window_left, window_right)

    n = n_slots
    if SHARED:
        if lengths is not None:
            p_length = lengths.ptr + i_b * lengths.stride_b + i_group * lengths.stride_h
            n = tl.minimum(tl.maximum(tl.load(p_length), 0), n_slots)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        p_k_rows = kv.pointers(keys.rows, i_b, i_group, o_n64)
        p_v_rows = kv.pointers(values.rows, i_b, i_group, o_n64)
        if not D_CHUNKED:
            b_k = kv.load_rows(p_k_rows, o_n < n, DIMS.D, DIMS.BLOCK_D, True)
        if not DV_CHUNKED:
            b_v = kv.load_rows(p_v_rows, o_n < n, DIMS.DV, DIMS.BLOCK_DV, True)

    b_dk = tl.zeros([BLOCK_N, DIMS.BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, DIMS.BLOCK_DV], tl.float32)
    for i_sorted in tl.range(i_sorted_first, i_sorted_stop):
        i_head = tl.load(p_plan + i_sorted).to(tl.int64)
        if not SHARED:
            i_k_head = tl.load(p_plan + num_heads + i_sorted).to(tl.int64)
            i_v_head = tl.load(p_plan + 2 * num_heads + i_sorted).to(tl.int64)
            if lengths is not None:
                p_length = lengths.ptr + i_b * lengths.stride_b + i_k_head * lengths.stride_h
                n = tl.minimum(tl.maximum(tl.load(p_length), 0), n_slots)
            p_k_rows = kv.pointers(keys.rows, i_b, i_k_head, o_n64)
            p_v_rows = kv.pointers(values.rows, i_b, i_v_head, o_n64)
            if not D_CHUNKED:
                b_k = kv.load_rows(p_k_rows, o_n < n, DIMS.D, DIMS.BLOCK_D, True)
            if not DV_CHUNKED:
                b_v = kv.load_rows(p_v_rows, o_n < n, DIMS.DV, DIMS.BLOCK_DV, True)
        shift = n - n_q
        i_row = kv.first_row(p_q_offsets, i_b, i_head, i_token, num_heads, num_tokens)
        q_head = kv.rows_of_head(q, i_b, i_head, i_token)
        dout_head = kv.rows_of_head(dout, i_b, i_head, i_token)
        slope, p_mask_head = None, None
        if slopes is not None:
            slope = tl.load(slopes.ptr + i_b * slopes.stride_b + i_head * slopes.stride_h)
        if mask is not None:
            p_mask_head = mask.ptr + i_b * mask.stride_b + i_head * mask.stride_h
        start, stop = seeing_queries(i_first, i_first + BLOCK_N - 1, shift, n, n_q, window, BLOCK_M)
        # One loop with masking code throughout: loops of their own for whole blocks, as in the
        # forward, cost more registers here (spills at D 128) than the comparisons cost time.
        for i_m in tl.range(start, stop, BLOCK_M):
            o_m = i_m + o_block  # [BLOCK_M]
            o_m64 = o_m.to(tl.int64)
            m_m = o_m < n_q
            # [BLOCK_M, BLOCK_D]
            p_q_rows = kv.row_pointers(q_head, 0, o_m64, False)
            if dk is not None or not D_CHUNKED:
                b_q = kv.load_rows(p_q_rows, m_m, DIMS.D, DIMS.BLOCK_D, True, i_d_col)
            # [BLOCK_N, BLOCK_M]
            if D_CHUNKED:
                b_qk = row_products(
                    p_k_rows, o_n < n, p_q_rows, m_m, DIMS.D, DIMS.BLOCK_D, BLOCK_N, BLOCK_M
                )
            else:
                b_qk = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            b_capped = common.cap_scores(b_qk, scale, log2_scale, softcap)
            b_score = common.bias_and_mask(
                b_capped,
                o_n[:, None],
                (o_m + shift)[None, :],
                m_m[None, :],
                slope,
                mask,
                (p_mask_head + o_m64 * mask.stride_m)[None, :] if mask is not None else None,
                n,
                window,
                True,
            )
            b_lse = load_lse(p_lse + i_row + o_m64, m_m)  # [BLOCK_M]
            b_p = probabilities(
                b_score, log2_scale, b_lse[None, :], q.ptr.dtype.element_ty == tl.float32
            )
            m_keep = None
            if p_seed is not None:
                m_keep = keep_tile_keys_first(
                    p_seed, i_first, o_m, (i_b * num_heads + i_head).to(tl.int32),
                    dropout_threshold, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            # [BLOCK_M, BLOCK_DV]
            p_dout_rows = kv.row_pointers(dout_head, 0, o_m64, False)
            if dv is not None or not DV_CHUNKED:
                b_dout = kv.load_rows(p_dout_rows, m_m, DIMS.DV, DIMS.BLOCK_DV, True, i_dv_col)
            if dv is not None:
                b_kept = b_p
                if p_seed is not None:
                    b_kept = tl.where(m_keep, b_p * dropout_scale, 0.0)
                b_dv = tl.dot(b_kept.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
            if dk is not None:
                b_delta = tl.load(p_delta + i_row + o_m64, mask=m_m, other=0.0)
                if DV_CHUNKED:
                    b_dp = row_products(
                        p_v_rows,
                        o_n < n,
                        p_dout_rows,
                        m_m,
                        DIMS.DV,
                        DIMS.BLOCK_DV,
                        BLOCK_N,
                        BLOCK_M,
                    )
                else:
                    b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
                b_dp = through_dropout(b_dp, m_keep, dropout_scale)
                b_ds = b_p * (b_dp - b_delta[None, :])
                b_ds = through_cap(b_ds, b_capped, softcap)
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    if dk is not None:
        p_dk_rows = kv.pointers(dk, i_b, i_group, o_n64)
        common.store_rows(p_dk_rows, b_dk * scale, m_slots, DIMS.D, DIMS.BLOCK_D, i_d_col)
    if dv is not None:
        p_dv_rows = kv.pointers(dv, i_b, i_group, o_n64)
        common.store_rows(p_dv_rows, b_dv, m_slots, DIMS.DV, DIMS.BLOCK_DV, i_dv_col)
