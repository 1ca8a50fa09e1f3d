"""Append: write new tokens into a cache, rotated and quantised on the way.

Grid    one program per (sequence, head, block of BLOCK_T new tokens), flattened, token blocks
        fastest; the heads are those of k_new, then of v_new, then of q.
Program loads its rows, and rotates those of k_new and q by their position. It stores the rows of q
        to the rotated copy and all others to their slots, as they are or quantised. The scale
        (and zero) of a quantised row is computed from the row, or read if the cache fixes it.
        It drops tokens beyond the cache and tokens in a page out of range.

A rotated column needs its own value and its partner's, so a program may take the columns of a row
in any order: for int4 it takes the even and the odd ones separately.

Source: formats and rounding as gqa_kernels/cache/formats.py defines them; own code.
"""

import triton
import triton.language as tl

from . import kv

ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to nearest even


@triton.jit
def round_to_integer(b_x):
    """The nearest integer, ties to even, of |x| below 2^22."""
    return (b_x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER


@triton.jit
def fp32_to_fp8(b_x, FORMAT: tl.constexpr):
    """fp8 bytes of fp32 values inside the format's range, rounded to nearest even.

    With M mantissa bits and exponent bias B: a normal number is rounded as an integer, on the bits
    of the fp32 number; a subnormal one by adding a number whose last place is that of the result.
    """
    M: tl.constexpr = 3 if FORMAT == kv.FP8_E4M3 else 2
    B: tl.constexpr = 7 if FORMAT == kv.FP8_E4M3 else 15
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_sign = (b_bits >> 24) & 0x80
    b_bits = b_bits & 0x7FFFFFFF
    b_abs = b_bits.to(tl.float32, bitcast=True)
    b_half = (1 << (22 - M)) - 1 + ((b_bits >> (23 - M)) & 1)
    b_normal = ((b_bits + b_half) >> (23 - M)) - ((127 - B) << M)
    MAGIC: tl.constexpr = (127 - B + 1 + 23 - M) << 23  # bits of 2^(1 - B - M + 23)
    b_magic = tl.full(b_x.shape, MAGIC, tl.uint32).to(tl.float32, bitcast=True)
    b_subnormal = (b_abs + b_magic).to(tl.uint32, bitcast=True) - MAGIC
    b_byte = tl.where(b_bits < ((127 - B + 1) << 23), b_subnormal, b_normal)
    b_byte = tl.where(b_abs != b_abs, 0x7F, b_byte)
    return (b_byte | b_sign).to(tl.uint8)


@triton.jit
def load_columns(
    p_rows,  # [BLOCK_T] pointers to column 0
    m_rows,  # [BLOCK_T]
    o_cols,  # [BLOCK] columns
    p_cos,  # [BLOCK_T] pointers to the rows of the tables
    p_sin,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Columns of rows after the rotary embedding, in the rows' type: [BLOCK_T, BLOCK]."""
    m_tile = m_rows[:, None] & (o_cols < DIM)[None, :]
    b_x = tl.load(p_rows[:, None] + o_cols[None, :], mask=m_tile, other=0)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        if INTERLEAVED:
            o_partner, o_angle, is_first = o_cols ^ 1, o_cols // 2, o_cols % 2 == 0
        else:
            is_first = o_cols < HALF
            o_partner = tl.where(is_first, o_cols + HALF, o_cols - HALF)
            o_angle = o_cols % HALF
        m_turned = m_rows[:, None] & (o_cols < ROTARY_DIM)[None, :]
        b_partner = tl.load(p_rows[:, None] + o_partner[None, :], mask=m_turned, other=0)
        b_cos = tl.load(p_cos[:, None] + o_angle[None, :], mask=m_turned, other=1).to(tl.float32)
        b_sin = tl.load(p_sin[:, None] + o_angle[None, :], mask=m_turned, other=0).to(tl.float32)
        b_sin = tl.where(is_first[None, :], -b_sin, b_sin)
        b_turned = b_x.to(tl.float32) * b_cos + b_partner.to(tl.float32) * b_sin
        b_x = b_turned.to(p_rows.dtype.element_ty)
    return b_x


@triton.jit
def row_scales(b_x, b_y, FORMAT: tl.constexpr, WITH_ZERO: tl.constexpr):
    """Scale and zero of rows whose columns are those of two tiles: fp32 [BLOCK_T] each."""
    if WITH_ZERO:
        LOW: tl.constexpr = -128.0 if FORMAT == kv.INT8 else 0.0
        RANGE: tl.constexpr = 255.0 if FORMAT == kv.INT8 else 15.0
        # Masked columns are 0, which the range holds anyway.
        b_low = tl.minimum(tl.minimum(tl.min(b_x, 1), tl.min(b_y, 1)), 0.0)
        b_high = tl.maximum(tl.maximum(tl.max(b_x, 1), tl.max(b_y, 1)), 0.0)
        b_scale = tl.div_rn(b_high - b_low, tl.full(b_low.shape, RANGE, tl.float32))
        b_steps = tl.div_rn(b_low, tl.where(b_scale > 0, b_scale, 1.0))
        b_zero = LOW - round_to_integer(b_steps)
    else:
        if FORMAT == kv.FP8_E4M3:
            HIGH: tl.constexpr = 448.0
        elif FORMAT == kv.FP8_E5M2:
            HIGH: tl.constexpr = 57344.0
        elif FORMAT == kv.INT8:
            HIGH: tl.constexpr = 127.0
        else:
            HIGH: tl.constexpr = 7.0
        b_high = tl.maximum(tl.max(tl.abs(b_x), 1), tl.max(tl.abs(b_y), 1))
        b_scale = tl.div_rn(b_high, tl.full(b_high.shape, HIGH, tl.float32))
        b_zero = tl.zeros(b_high.shape, tl.float32)
        if FORMAT == kv.INT4:
            b_zero += 8.0
    return b_scale, b_zero


@triton.jit
def quantise(b_x, b_scale, b_zero, FORMAT: tl.constexpr):
    """Stored numbers as bytes."""
    b_safe = tl.where(b_scale > 0, b_scale, 1.0)
    b_stored = tl.div_rn(b_x, tl.broadcast_to(b_safe[:, None], b_x.shape))
    b_stored = tl.where((b_scale > 0)[:, None], b_stored, 0.0)
    if FORMAT == kv.FP8_E4M3 or FORMAT == kv.FP8_E5M2:
        b_stored += b_zero[:, None]
        HIGH: tl.constexpr = 448.0 if FORMAT == kv.FP8_E4M3 else 57344.0
        b_nan = b_stored != b_stored
        b_stored = tl.minimum(tl.maximum(b_stored, -HIGH), HIGH)
        b_stored = tl.where(b_nan, float("nan"), b_stored)
        return fp32_to_fp8(b_stored, FORMAT)
    # The bound is beyond every range, and near enough for the rounding.
    b_stored = tl.where(b_stored == b_stored, b_stored, 0.0)
    b_stored = round_to_integer(tl.minimum(tl.maximum(b_stored, -4096.0), 4096.0))
    b_stored += b_zero[:, None]
    if FORMAT == kv.INT8:
        return tl.minimum(tl.maximum(b_stored, -128.0), 127.0).to(tl.int8)
    return tl.minimum(tl.maximum(b_stored, 0.0), 15.0).to(tl.uint8)


@triton.jit
def store_side(
    p_new,  # [BLOCK_T] pointers to new rows
    m_rows,  # [BLOCK_T]
    p_cos,
    p_sin,
    p_rows,  # [BLOCK_T] pointers to their rows in the cache, and to their scale and zero
    p_scale,
    p_zero,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """Rotate, quantise and store the rows of one head."""
    WIDTH: tl.constexpr = BLOCK_D // 2 if FORMAT == kv.INT4 else BLOCK_D
    STORED: tl.constexpr = DIM // 2 if FORMAT == kv.INT4 else DIM
    o_cols = tl.arange(0, WIDTH)  # columns of the memory
    p_tile = p_rows[:, None] + o_cols[None, :]
    m_tile = m_rows[:, None] & (o_cols < STORED)[None, :]
    if FORMAT == kv.PLAIN:
        b_x = load_columns(p_new, m_rows, o_cols, p_cos, p_sin, DIM, ROTARY_DIM, INTERLEAVED)
        tl.store(p_tile, b_x, mask=m_tile)
    else:
        if FORMAT == kv.INT4:
            b_x = load_columns(
                p_new, m_rows, 2 * o_cols, p_cos, p_sin, DIM, ROTARY_DIM, INTERLEAVED
            ).to(tl.float32)
            b_y = load_columns(
                p_new, m_rows, 2 * o_cols + 1, p_cos, p_sin, DIM, ROTARY_DIM, INTERLEAVED
            ).to(tl.float32)
        else:
            b_x = load_columns(
                p_new, m_rows, o_cols, p_cos, p_sin, DIM, ROTARY_DIM, INTERLEAVED
            ).to(tl.float32)
            b_y = b_x
        if DYNAMIC:
            b_scale, b_zero = row_scales(b_x, b_y, FORMAT, p_zero is not None)
            tl.store(p_scale, b_scale, mask=m_rows)
            if p_zero is not None:
                tl.store(p_zero, b_zero, mask=m_rows)
        else:
            b_scale = tl.load(p_scale, mask=m_rows, other=1.0)
            b_zero = tl.zeros(b_scale.shape, tl.float32)
            if p_zero is not None:
                b_zero = tl.load(p_zero, mask=m_rows, other=0.0)
            elif FORMAT == kv.INT4:
                b_zero += 8.0
        b_bytes = quantise(b_x, b_scale, b_zero, FORMAT)
        if FORMAT == kv.INT4:
            b_bytes = b_bytes | (quantise(b_y, b_scale, b_zero, FORMAT) << 4)
        tl.store(p_tile, b_bytes, mask=m_tile)


@triton.jit
def store_head(
    stored,  # Stored
    p_new,  # [BLOCK_T] pointers to new rows
    m_rows,  # [BLOCK_T]
    o_page,  # [BLOCK_T] page and slot of each row, int64
    i_head,
    o_slot,
    p_cos,
    p_sin,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """Store the new rows of one head of K or V to their slots."""
    store_side(
        p_new,
        m_rows,
        p_cos,
        p_sin,
        kv.pointers(stored.rows, o_page, i_head, o_slot),
        kv.pointers(stored.scale, o_page, i_head, o_slot) if stored.scale is not None else None,
        kv.pointers(stored.zero, o_page, i_head, o_slot) if stored.zero is not None else None,
        DIM,
        BLOCK_D,
        ROTARY_DIM,
        INTERLEAVED,
        stored.FORMAT,
        DYNAMIC,
    )


@triton.jit(
    do_not_specialize=[
        "num_k_heads",
        "num_v_heads",
        "num_heads",
        "num_blocks",
        "num_tokens",
        "max_new",
        "num_pages",
        "max_pages",
        "max_position",
    ]
)
def append_kernel(
    q,  # Rows [B, Hq, S, D]; packed [1, Hq, tokens, D]; or None
    k_new,  # Rows [B, Hk, S, D]; packed [1, Hk, tokens, D]
    v_new,  # Rows [B, Hv, S, Dv]; likewise
    keys,  # Stored [P, Hk, page_size, D]
    values,  # Stored [P, Hv, page_size, Dv]
    rotated,  # Rows, like q
    lengths,  # PerHead [B, Hk] int32, keys before
    pages,  # Pages, or None
    p_begin,  # [B] int32, or None
    p_new_offsets,  # [B + 1] int32, or None
    p_cos,  # [max_position, ROTARY_DIM / 2], or None
    p_sin,
    num_k_heads,
    num_v_heads,
    num_heads,  # of k_new, v_new and, if it is rotated, q
    num_blocks,  # of tokens
    num_tokens,  # S; of packed sequences the sum
    max_new,  # most new tokens of a sequence
    num_pages,
    max_pages,
    max_position,
    DIMS,  # Dims
    BLOCK_T: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DYNAMIC_K: tl.constexpr,
    DYNAMIC_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    # Program id -> sequence, head, token block.
    i_program = tl.program_id(0)
    i_block = i_program % num_blocks
    i_head = i_program // num_blocks % num_heads
    i_b = (i_program // num_blocks // num_heads).to(tl.int64)
    i_token, n_new = 0, max_new
    if p_new_offsets is not None:
        i_token, n_new = kv.packed_queries(p_new_offsets, i_b, max_new, num_tokens)
    o_t = i_block * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T] new tokens of the sequence
    m_rows = o_t < n_new
    o_t64 = o_t.to(tl.int64) + i_token

    # Position, slot and page of each token. A value head beyond the key heads, or a query head,
    # goes by key head 0: all have one length then.
    is_key, is_value = i_head < num_k_heads, i_head < num_k_heads + num_v_heads
    i_side_head = tl.where(is_key, i_head, i_head - num_k_heads).to(tl.int64)
    i_row = tl.where(i_side_head < num_k_heads, i_side_head, 0)
    length = tl.load(lengths.ptr + i_b * lengths.stride_b + i_row * lengths.stride_h)
    o_position = length + o_t
    o_slot = o_position
    if p_begin is not None:
        o_slot += tl.load(p_begin + i_b)
    o_entry = o_slot // PAGE_SIZE
    m_stored = m_rows & (o_slot >= 0) & (o_entry < max_pages)
    o_page = tl.zeros([BLOCK_T], tl.int64) + i_b
    if pages is not None:
        p_entry = pages.ptr + i_b * pages.stride_b + i_row * pages.stride_h
        p_entry += o_entry.to(tl.int64) * pages.stride_p
        o_page = tl.load(p_entry, mask=m_stored, other=-1).to(tl.int64)
    m_stored = m_stored & (o_page >= 0) & (o_page < num_pages)
    o_slot = (o_slot % PAGE_SIZE).to(tl.int64)

    p_cos_rows = p_cos
    p_sin_rows = p_sin
    if ROTARY_DIM > 0:
        o_angle_row = tl.minimum(tl.maximum(o_position, 0), max_position - 1).to(tl.int64)
        p_cos_rows = p_cos + o_angle_row * (ROTARY_DIM // 2)
        p_sin_rows = p_sin + o_angle_row * (ROTARY_DIM // 2)

    if is_key:
        store_head(
            keys,
            kv.pointers(k_new, i_b, i_side_head, o_t64),
            m_stored,
            o_page,
            i_side_head,
            o_slot,
            p_cos_rows,
            p_sin_rows,
            DIMS.D,
            DIMS.BLOCK_D,
            ROTARY_DIM,
            INTERLEAVED,
            DYNAMIC_K,
        )
    elif is_value:
        store_head(
            values,
            kv.pointers(v_new, i_b, i_side_head, o_t64),
            m_stored,
            o_page,
            i_side_head,
            o_slot,
            p_cos_rows,
            p_sin_rows,
            DIMS.DV,
            DIMS.BLOCK_DV,
            0,
            INTERLEAVED,
            DYNAMIC_V,
        )
    elif q is not None:
        i_q_head = i_side_head - num_v_heads
        store_side(
            kv.pointers(q, i_b, i_q_head, o_t64),
            m_rows,
            p_cos_rows,
            p_sin_rows,
            kv.pointers(rotated, i_b, i_q_head, o_t64),
            None,
            None,
            DIMS.D,
            DIMS.BLOCK_D,
            ROTARY_DIM,
            INTERLEAVED,
            kv.PLAIN,
            False,
        )
