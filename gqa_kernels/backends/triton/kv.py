"""Where the keys and values of a tile lie, and what their stored numbers mean.

The one seam between the attention kernels and a KV cache. A kernel bundles what it knows into three
tuples, fixed for a tile's sequence and head, and the key loop asks here for rows:

    table   (p_table, stride_p, num_pages, begin): the page-table row of the sequence and key head,
            and the slot of its first key; only read where PAGED
    keys    (p_rows, stride_page, stride_slot, p_scale, stride, stride, p_zero, stride, stride)
    values  the same; strides are per page and per slot. What there is not is left off the end.

Without a page table, p_rows is key 0 itself and a key's row is one multiplication away, as ever.
A page id out of range is never followed: its rows are zero and the scores of its keys NaN.

Stored numbers stand for (stored - zero) * scale (gqa_kernels/cache/quantized.py). fp8 arrives as
bytes and is widened with integer operations, which every GPU has and the interpreter too. A key's
scale is left out of the product and multiplies its score.
"""

import triton
import triton.language as tl

# Values of FORMAT.
PLAIN = tl.constexpr(0)
FP8_E4M3 = tl.constexpr(1)
FP8_E5M2 = tl.constexpr(2)
INT8 = tl.constexpr(3)
INT4 = tl.constexpr(4)


@triton.jit
def load_rows(
    p_rows,  # [ROWS] pointers to column 0
    m_rows,  # [ROWS]
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows of DIM elements as a [ROWS, BLOCK] tile, zero in masked rows and padding columns.

    Zero and not undefined: a NaN in an unused slot times a probability of 0 would be NaN.
    """
    o_cols = tl.arange(0, BLOCK)
    p_tile = p_rows[:, None] + o_cols[None, :]
    if CHECK_ROWS and DIM != BLOCK:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & (o_cols < DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        b_tile = tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif DIM != BLOCK:
        b_tile = tl.load(p_tile, mask=(o_cols < DIM)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def packed_queries(p_q_offsets, i_b, q_len, num_tokens):
    """(first token, tokens) of a packed sequence, inside the tokens there are and at most q_len."""
    i_token = tl.minimum(tl.maximum(tl.load(p_q_offsets + i_b), 0), num_tokens)
    i_stop = tl.minimum(tl.load(p_q_offsets + i_b + 1), num_tokens)
    return i_token.to(tl.int64), tl.minimum(tl.maximum(i_stop - i_token, 0), q_len)


@triton.jit
def rows_of_head(
    p_rows,
    strides,  # of a page, a head and a slot
    p_scale,
    scale_strides,
    p_zero,
    zero_strides,
    i_storage,
    i_head,
    i_slot,
    FORMAT: tl.constexpr,
):
    """The tuple of a head's keys or values: as long as what there is."""
    rows = (
        p_rows + i_storage * strides[0] + i_head * strides[1] + i_slot * strides[2],
        strides[0],
        strides[2],
    )
    if FORMAT != PLAIN:
        rows += (
            p_scale
            + i_storage * scale_strides[0]
            + i_head * scale_strides[1]
            + i_slot * scale_strides[2],
            scale_strides[0],
            scale_strides[2],
        )
        if p_zero is not None:
            rows += (
                p_zero
                + i_storage * zero_strides[0]
                + i_head * zero_strides[1]
                + i_slot * zero_strides[2],
                zero_strides[0],
                zero_strides[2],
            )
    return rows


@triton.jit
def locate(
    table,
    i_n,  # first key of the block, a multiple of BLOCK_N
    o_n,  # [BLOCK_N] keys
    m_n,  # [BLOCK_N] keys there are
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
):
    """(page, slot in it, key can be read) of a block's keys: page a scalar or [BLOCK_N] int64."""
    p_table, stride_p, num_pages, begin = table
    if PAGE_SIZE % BLOCK_N == 0 and not HAS_BEGIN:
        # The block lies in one page: one look-up, and rows that follow each other.
        i_page = tl.load(p_table + tl.cast(i_n, tl.int64) // PAGE_SIZE * stride_p)
        in_range = (i_page >= 0) & (i_page < num_pages)
        o_page = tl.where(in_range, i_page, 0).to(tl.int64)
        o_slot = i_n % PAGE_SIZE + tl.arange(0, BLOCK_N)
        m_readable = m_n & in_range
    else:
        o_s = o_n + begin
        b_page = tl.load(p_table + (o_s // PAGE_SIZE).to(tl.int64) * stride_p, mask=m_n, other=0)
        in_range = (b_page >= 0) & (b_page < num_pages)
        o_page = tl.where(in_range, b_page, 0).to(tl.int64)
        o_slot = o_s % PAGE_SIZE
        m_readable = m_n & in_range
    return o_page, o_slot.to(tl.int64), m_readable


@triton.jit
def row_pointers(rows, o_page, o_slot, PAGED: tl.constexpr):
    """Pointers to the rows of keys or values: [BLOCK_N]."""
    if PAGED:
        return rows[0] + o_page * rows[1] + o_slot * rows[2]
    return rows[0] + o_slot * rows[2]


@triton.jit
def load_per_row(p_first, stride_page, stride_slot, o_page, o_slot, m_rows, PAGED: tl.constexpr):
    """One fp32 number per row (a scale or a zero), 0 where it can't be read: [BLOCK_N]."""
    p_numbers = p_first + o_slot * stride_slot
    if PAGED:
        p_numbers += o_page * stride_page
    return tl.load(p_numbers, mask=m_rows, other=0.0)


@triton.jit
def fp8_to_fp32(b_bytes, FORMAT: tl.constexpr):
    """Values of fp8 bytes, by way of fp16, whose exponent has as many bits as that of e5m2."""
    b_bits = b_bytes.to(tl.uint16)
    if FORMAT == FP8_E5M2:
        return (b_bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    # e4m3 has another bias: 7 in place of 15. Its one NaN is the byte without a zero bit.
    b_magnitude = b_bits & 0x7F
    b_half = (((b_bits & 0x80) << 8) | (b_magnitude << 7)).to(tl.float16, bitcast=True)
    return tl.where(b_magnitude == 0x7F, float("nan"), b_half.to(tl.float32) * 256.0)


@triton.jit
def load_stored(
    rows,
    o_page,
    o_slot,
    m_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Stored numbers less their zeros: fp32 [BLOCK_N, BLOCK]."""
    p_rows = row_pointers(rows, o_page, o_slot, PAGED)
    default_zero = 0.0
    if FORMAT == INT4:
        b_pairs = load_rows(p_rows, m_rows, DIM // 2, BLOCK // 2, True)
        b_stored = tl.interleave(b_pairs & 15, b_pairs >> 4).to(tl.float32)
        default_zero = 8.0
    elif FORMAT == INT8:
        b_stored = load_rows(p_rows, m_rows, DIM, BLOCK, True).to(tl.float32)
    else:
        b_stored = fp8_to_fp32(load_rows(p_rows, m_rows, DIM, BLOCK, True), FORMAT)
    if HAS_ZERO:
        b_zero = load_per_row(rows[6], rows[7], rows[8], o_page, o_slot, m_rows, PAGED)
        b_stored -= b_zero[:, None]
    elif default_zero != 0.0:
        b_stored -= default_zero
    return b_stored


@triton.jit
def load_scales(rows, o_page, o_slot, m_rows, PAGED: tl.constexpr):
    """The scale of each row: fp32 [BLOCK_N]."""
    return load_per_row(rows[3], rows[4], rows[5], o_page, o_slot, m_rows, PAGED)
