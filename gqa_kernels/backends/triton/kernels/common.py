"""Device helpers shared by the forward kernels: key ranges, scores, masking, online softmax.

A kernel works on a tile of BLOCK_M *rows*. A row is one (query token, query head) pair. Each kernel
maps rows to tokens and heads in its own way, and describes its rows by one vector per fact
(``TileRows``). So prefill and decode share one definition of the formula.

The running state of a tile is (b_acc, b_sum, b_max): the unnormalised output, the sum of the
exponentials, and the maximum of the scores seen so far. A row that has seen no key has the state
(0, 0, -inf). b_max is in base 2 (natural units times LOG2E). Scores are in natural units, or are
the plain products q . k if nothing but the scale changes them (``log2_scale``). Then
exp2(score * unit - b_max), with the unit LOG2E or scale * LOG2E, takes one fused multiply-add and
one instruction. b_max is exactly the number that was subtracted, so it leaves no rounding error in
the LSE.

Source: the online softmax is that of FlashAttention (Dao et al., arXiv 2205.14135).
"""

import triton
import triton.language as tl

from ....call import options
from . import kv
from .dropout import keep_tile

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST_MASK_VALUE = tl.constexpr(options.LOWEST_MASK_VALUE)  # values below it hide their key
LN2 = tl.constexpr(0.6931471805599453)

# Parts of a tile's key range: the inner blocks, which every row sees in full, take no masking code.
LEFT_EDGE = tl.constexpr(0)
INNER = tl.constexpr(1)
RIGHT_EDGE = tl.constexpr(2)

# Odd minimax polynomial of tanh on [-0.625, 0.625]: x + x^3 * (C0 + C1 x^2 + ...), 8e-8 relative.
TANH_BOUND = tl.constexpr(0.625)
TANH_C0 = tl.constexpr(-0.3333328068)
TANH_C1 = tl.constexpr(0.1333144158)
TANH_C2 = tl.constexpr(-0.0537397154)
TANH_C3 = tl.constexpr(0.0206390861)
TANH_C4 = tl.constexpr(-0.0057049864)


@triton.jit
def tanh(b_x):
    """tanh in fp32. Near 0 the exponential form cancels, so a polynomial is used there."""
    b_abs = tl.abs(b_x)
    b_exp = tl.exp2(b_abs * (-2.0 * LOG2E))
    b_large = (1.0 - b_exp) / (1.0 + b_exp)
    b_large = tl.where(b_x < 0, -b_large, b_large)
    b_sq = tl.minimum(b_x * b_x, 1.0)  # the unused branch must not overflow
    b_poly = TANH_C4 * b_sq + TANH_C3
    b_poly = b_poly * b_sq + TANH_C2
    b_poly = b_poly * b_sq + TANH_C1
    b_poly = b_poly * b_sq + TANH_C0
    return tl.where(b_abs < TANH_BOUND, b_poly * b_sq * b_x + b_x, b_large)


@triton.jit
def store_rows(
    p_rows,  # [ROWS] pointers to column 0
    b_tile,  # [ROWS, BLOCK]
    m_rows,  # [ROWS]
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    first=0,
):
    """Store columns from `first` on of rows of DIM elements, rounded to the output's type."""
    o_cols = first + tl.arange(0, BLOCK)
    m_tile = m_rows[:, None] & (o_cols < DIM)[None, :]
    tl.store(p_rows[:, None] + o_cols[None, :], b_tile.to(p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def program_slice(DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(program, first column) of a launch with one program per BLOCK of DIM output columns."""
    i_program = tl.program_id(0)
    NUM_SLICES: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    return i_program // NUM_SLICES, i_program % NUM_SLICES * BLOCK


@triton.jit
def visible_keys(
    i_first,  # first and last query token of the tile
    i_last,
    shift,  # position of query token 0 among the keys: n - Sq
    n,  # keys of the sequence
    window,
    BLOCK_N: tl.constexpr,
):
    """Key ranges of a tile: (start, inner_start, inner_stop, stop), each <= the next.

    No row sees a key outside [start, stop); every row sees all of [inner_start, inner_stop), up
    to the mask tensor. All but `stop` are multiples of BLOCK_N, unless nothing is visible.
    """
    start = 0
    inner_start = 0
    stop = n
    inner_stop = n
    if window.right is not None:
        stop = tl.maximum(tl.minimum(n, i_last + shift + window.right + 1), 0)
        inner_stop = tl.maximum(tl.minimum(n, i_first + shift + window.right + 1), 0)
    inner_stop = inner_stop // BLOCK_N * BLOCK_N
    if window.left is not None:
        start = tl.maximum(i_first + shift - window.left, 0) // BLOCK_N * BLOCK_N
        inner_start = tl.cdiv(tl.maximum(i_last + shift - window.left, 0), BLOCK_N) * BLOCK_N
        inner_start = tl.minimum(inner_start, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
        inner_stop = tl.maximum(inner_stop, inner_start)
    return start, inner_start, inner_stop, stop


@triton.jit
def exponent_unit(log2_scale):
    """What brings the scores of :func:`cap_scores` to base 2."""
    return LOG2E if log2_scale is None else log2_scale


@triton.jit
def cap_scores(b_qk, scale, log2_scale, softcap):
    """Scaled and, with a softcap, capped scores of q . k; with ``log2_scale`` q . k itself."""
    b_score = b_qk
    if log2_scale is None:
        b_score = b_qk * scale
    if softcap is not None:
        b_score = tanh(b_score / softcap) * softcap
    return b_score


@triton.jit
def bias_and_mask(
    b_score,  # a tile of scores, keys along either axis; the other arguments broadcast to it
    o_n,  # key positions
    b_pos,  # query positions among the keys
    m_rows,
    b_slope,  # ALiBi slopes, or None
    mask,  # Mask, or None
    p_mask,  # pointers to the rows of the mask, or None
    n,
    window,
    EDGE: tl.constexpr,
):
    """Scores with biases, -inf where not visible. EDGE: the length and the window may cut them."""
    if b_slope is not None:
        b_score -= b_slope * tl.abs(b_pos - o_n).to(tl.float32)
    if mask is not None:
        p_tile = p_mask + o_n.to(tl.int64) * mask.stride_n
        b_mask = tl.load(p_tile, mask=m_rows & (o_n < n), other=0)
        if b_mask.dtype == tl.uint8:
            b_score = tl.where(b_mask != 0, b_score, float("-inf"))
        else:
            # Not by adding -inf: the score of a hidden key may be NaN.
            b_mask = b_mask.to(tl.float32)
            b_score = tl.where(b_mask < LOWEST_MASK_VALUE, float("-inf"), b_score + b_mask)
    if EDGE:
        m_visible = o_n < n
        if window.right is not None:
            m_visible = m_visible & (o_n <= b_pos + window.right)
        if window.left is not None:
            m_visible = m_visible & (o_n >= b_pos - window.left)
        b_score = tl.where(m_visible, b_score, float("-inf"))
    return b_score


@triton.jit
def finite_or_zero(b_max):
    """The maximum to subtract from scores: 0 in place of -inf, as (-inf) - (-inf) is NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def attend(
    q,  # Rows
    rows,  # TileRows
    keys,  # Stored
    values,  # Stored
    pages,  # Pages, or None
    source,  # Source
    num_pages,
    span,  # (first query token, last, position of token 0 among the keys) of the tile
    split,  # (this split, number of splits), or None
    window,  # Window
    mask,  # Mask, or None
    scale,
    log2_scale,  # scale * LOG2E, or None
    softcap,
    p_seed,  # dropout's seed and offset, or None
    dropout_threshold,
    DIMS,  # Dims
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
):
    """State (b_acc, b_sum, b_max) of a tile after the keys that it sees, or this split's of them.

    Dropout removes probabilities from b_acc; the caller divides the rest by 1 - p.
    """
    PAGED: tl.constexpr = pages is not None
    i_b, i_k_head, i_v_head, n, begin, i_v_col = source
    i_storage, i_slot, p_table = i_b, tl.cast(begin, tl.int64), None
    if PAGED:  # the table says where each key lies
        i_storage, i_slot = 0, 0
        p_table = pages.ptr + i_b * pages.stride_b + i_k_head * pages.stride_h
    k_rows = kv.rows_of_head(keys.rows, i_storage, i_k_head, i_slot)
    v_rows = kv.rows_of_head(values.rows, i_storage, i_v_head, i_slot)
    k_scale, v_scale, k_zero, v_zero = None, None, None, None
    if keys.scale is not None:
        k_scale = kv.rows_of_head(keys.scale, i_storage, i_k_head, i_slot)
    if keys.zero is not None:
        k_zero = kv.rows_of_head(keys.zero, i_storage, i_k_head, i_slot)
    if values.scale is not None:
        v_scale = kv.rows_of_head(values.scale, i_storage, i_v_head, i_slot)
    if values.zero is not None:
        v_zero = kv.rows_of_head(values.zero, i_storage, i_v_head, i_slot)
    i_first, i_last, shift = span
    b_pos = rows.o_m + shift  # [BLOCK_M], query positions among the keys
    p_q_rows = kv.pointers(q, i_b, rows.o_head, rows.o_token)
    # Q stays in registers or shared memory, unless it takes several chunks of columns.
    CHUNKED: tl.constexpr = DIMS.D > DIMS.BLOCK_D
    if not CHUNKED:
        b_q = kv.load_rows(p_q_rows, rows.m_rows, DIMS.D, DIMS.BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    start, inner_start, inner_stop, stop = visible_keys(i_first, i_last, shift, n, window, BLOCK_N)
    if split is not None:
        # This split's share of the key blocks that the tile's tokens see.
        i_split, num_splits = split
        blocks_per_split = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), BLOCK_N), num_splits)
        split_start = start + i_split * blocks_per_split * BLOCK_N
        split_stop = split_start + blocks_per_split * BLOCK_N
        inner_start = tl.minimum(tl.maximum(inner_start, split_start), split_stop)
        inner_stop = tl.minimum(tl.maximum(inner_stop, split_start), split_stop)
        start = split_start
        stop = tl.minimum(stop, split_stop)
    unit = exponent_unit(log2_scale)
    b_acc = tl.zeros([BLOCK_M, DIMS.BLOCK_DV], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    o_block = tl.arange(0, BLOCK_N)
    for part in tl.static_range(LEFT_EDGE if window.left is not None else INNER, RIGHT_EDGE + 1):
        if part == LEFT_EDGE:
            part_start, part_stop = start, inner_start
        elif part == INNER:
            part_start, part_stop = inner_start, inner_stop
        else:
            part_start, part_stop = inner_stop, stop
        for i_n in tl.range(part_start, part_stop, BLOCK_N):
            o_n = i_n + o_block  # [BLOCK_N]
            m_n = o_n < n
            if PAGED:
                o_page, o_slot, m_readable = kv.locate(
                    pages, p_table, num_pages, begin, i_n, o_n, m_n, BLOCK_N, HAS_BEGIN
                )
            else:
                o_page, o_slot, m_readable = tl.cast(i_n, tl.int64), o_block.to(tl.int64), m_n
            b_qk = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i_col in tl.static_range(0, DIMS.D, DIMS.BLOCK_D):
                if CHUNKED:
                    b_q = kv.load_rows(
                        p_q_rows, rows.m_rows, DIMS.D, DIMS.BLOCK_D, True, i_col
                    )  # [BLOCK_M, BLOCK_D]
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
                    part != INNER,
                    i_col,
                ).to(b_q.dtype)  # [BLOCK_N, BLOCK_D]
                b_qk = tl.dot(b_q, tl.trans(b_k), b_qk, input_precision="ieee")
            if keys.FORMAT != kv.PLAIN:
                b_qk *= kv.load_per_row(k_scale, o_page, o_slot, m_readable, PAGED)[None, :]
            b_score = cap_scores(b_qk, scale, log2_scale, softcap)
            b_score = bias_and_mask(
                b_score,
                o_n[None, :],
                b_pos[:, None],
                rows.m_rows[:, None],
                rows.b_slope[:, None] if rows.b_slope is not None else None,
                mask,
                rows.p_mask[:, None] if mask is not None else None,
                n,
                window,
                part != INNER,
            )
            if PAGED:  # a visible key whose page is out of range
                m_lost = (m_n & ~m_readable)[None, :] & (b_score > float("-inf"))
                b_score = tl.where(m_lost, float("nan"), b_score)
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * unit)
            b_shift = b_new_max
            if part != INNER or mask is not None:
                b_shift = finite_or_zero(b_new_max)
            b_p = tl.exp2(tl.fma(b_score, unit, -b_shift[:, None]))  # [BLOCK_M, BLOCK_N]
            b_rescale = tl.exp2(b_max - b_shift)  # [BLOCK_M]
            b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
            b_max = b_new_max
            if p_seed is not None:
                m_keep = keep_tile(
                    p_seed,
                    i_n,
                    rows.o_m,
                    rows.o_dropout_head,
                    dropout_threshold,
                    BLOCK_M,
                    BLOCK_N,
                )
                b_p = tl.where(m_keep, b_p, 0.0)
            b_v = kv.load_stored(
                v_rows,
                v_zero,
                o_page,
                o_slot,
                m_readable,
                DIMS.DV,
                DIMS.BLOCK_DV,
                values.FORMAT,
                PAGED,
                part != INNER,
                i_v_col,
            )  # [BLOCK_N, BLOCK_DV]
            if values.FORMAT != kv.PLAIN:
                b_v *= kv.load_per_row(v_scale, o_page, o_slot, m_readable, PAGED)[:, None]
                b_v = b_v.to(q.ptr.dtype.element_ty)
            b_acc = b_acc * b_rescale[:, None]
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_sum, b_max


@triton.jit
def add_sink(b_sum, b_max, b_sink):
    """Count one more logit, in natural units, in the softmax of rows that saw a key.

    Returns the new sum and maximum, and the factor that brings the unnormalised output to it.
    """
    b_new_max = tl.where(b_sum > 0, tl.maximum(b_max, b_sink * LOG2E), b_max)
    b_shift = finite_or_zero(b_new_max)
    b_factor = tl.exp2(b_max - b_shift)
    b_extra = tl.where(b_sum > 0, tl.exp2(tl.fma(b_sink, LOG2E, -b_shift)), 0.0)
    return b_sum * b_factor + b_extra, b_new_max, b_factor


@triton.jit
def normaliser(b_sum):
    """1 / sum, or 1 where no key was seen: the unnormalised output is 0 there."""
    return 1.0 / tl.where(b_sum == 0, 1.0, b_sum)


@triton.jit
def log_sum_exp(b_sum, b_max):
    """Natural log of the softmax denominator, -inf where no key was seen."""
    return tl.fma(b_max, LN2, tl.log(tl.where(b_sum == 0, 1.0, b_sum)))
