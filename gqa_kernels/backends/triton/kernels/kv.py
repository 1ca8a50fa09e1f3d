"""Where the keys and values of a tile lie, and what their stored numbers mean.

This is the only place where the attention kernels touch a KV cache. Before its key loop a kernel
moves the pointers of its page table, keys and values to its sequence and head (``rows_of_head``).
The loop then asks here for the rows of each block of keys. Without a page table, the address of a
key is its index times the stride. A page id out of range is never followed: its rows read as zero,
and the scores of its keys are NaN.

A stored number means (stored - zero) * scale (gqa_kernels/cache/formats.py). fp8 arrives as bytes
and is converted with integer operations, which every GPU and the interpreter have. The product
leaves the scale of a key out; the kernel multiplies the score by it instead.
"""

import triton
import triton.language as tl

from .arguments import Rows

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
    first=0,
):
    """Columns from `first` on of rows of DIM elements: a [ROWS, BLOCK] tile, zero in masked rows
    and padding columns. `first` is a multiple of BLOCK and less than DIM.

    Zero and not undefined: a NaN in an unused slot times a probability of 0 would be NaN.
    """
    o_cols = first + tl.arange(0, BLOCK)
    p_tile = p_rows[:, None] + o_cols[None, :]
    if CHECK_ROWS and DIM % BLOCK != 0:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & (o_cols < DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        b_tile = tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif DIM % BLOCK != 0:
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
def first_row(p_q_offsets, i_b, i_head, i_token, num_heads, num_tokens):
    """Where a sequence begins in a contiguous ``[B, Hq, Sq]``, or packed ``[1, Hq, tokens]``."""
    i_row = (i_b * num_heads + i_head) * num_tokens
    if p_q_offsets is not None:
        i_row = i_head * num_tokens + i_token
    return i_row


@triton.jit
def sequence_keys(lengths, p_begin, kv_len, i_b, i_k_head, valid):
    """(number of keys, slot of the first one) of a sequence and key head; no keys if not valid."""
    n, begin = kv_len, 0
    if p_begin is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_begin + i_b), 0), kv_len)
        n = kv_len - begin
    if lengths is not None:
        p_length = lengths.ptr + i_b * lengths.stride_b + i_k_head * lengths.stride_h
        n = tl.minimum(tl.maximum(tl.load(p_length, mask=valid, other=0), 0), n)
    return tl.where(valid, n, 0), begin


@triton.jit
def pointers(rows, i_b, i_head, o_n):
    """Pointers to rows of one or more heads, int64 indices."""
    return rows.ptr + i_b * rows.stride_b + i_head * rows.stride_h + o_n * rows.stride_n


@triton.jit
def rows_of_head(rows, i_b, i_head, i_slot):
    """The rows of one head, counted from a slot of it."""
    p_first = pointers(rows, i_b, i_head, i_slot)
    return Rows(p_first, rows.stride_b, rows.stride_h, rows.stride_n)


@triton.jit
def locate(
    pages,  # Pages
    p_table,  # the page-table row of a (sequence, key head)
    num_pages,
    begin,  # slot of the first key
    i_n,  # first key of the block, a multiple of BLOCK_N
    o_n,  # [BLOCK_N] keys
    m_n,  # [BLOCK_N] keys there are
    BLOCK_N: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
):
    """(page, slot in it, key can be read) of a block's keys: page a scalar or [BLOCK_N] int64."""
    if pages.PAGE_SIZE % BLOCK_N == 0 and not HAS_BEGIN:
        # The block lies in one page: one look-up, and rows that follow each other.
        i_entry = tl.cast(i_n, tl.int64) // pages.PAGE_SIZE
        i_page = tl.load(p_table + i_entry * pages.stride_p)
        in_range = (i_page >= 0) & (i_page < num_pages)
        o_page = tl.where(in_range, i_page, 0).to(tl.int64)
        o_slot = tl.cast(i_n, tl.int32) % pages.PAGE_SIZE + tl.arange(0, BLOCK_N)
        m_readable = m_n & in_range
    else:
        o_s = o_n + begin
        o_entry = (o_s // pages.PAGE_SIZE).to(tl.int64)
        b_page = tl.load(p_table + o_entry * pages.stride_p, mask=m_n, other=0)
        in_range = (b_page >= 0) & (b_page < num_pages)
        o_page = tl.where(in_range, b_page, 0).to(tl.int64)
        o_slot = o_s % pages.PAGE_SIZE
        m_readable = m_n & in_range
    return o_page, o_slot.to(tl.int64), m_readable


@triton.jit
def row_pointers(rows, o_page, o_slot, PAGED: tl.constexpr):
    """Pointers to the rows of keys or values: [BLOCK_N]."""
    if PAGED:
        return rows.ptr + o_page * rows.stride_b + o_slot * rows.stride_n
    return rows.ptr + o_page * rows.stride_n + o_slot * rows.stride_n


@triton.jit
def load_per_row(rows, o_page, o_slot, m_rows, PAGED: tl.constexpr):
    """One fp32 number per row (a scale or a zero), 0 if the row can't be read: [BLOCK_N]."""
    return tl.load(row_pointers(rows, o_page, o_slot, PAGED), mask=m_rows, other=0.0)


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
    rows,  # Rows of one head, and of its zeros or None
    zero,
    o_page,
    o_slot,
    m_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    PAGED: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    first=0,
):
    """Columns from `first` on of stored numbers less their zeros: [BLOCK_N, BLOCK], fp32 or, where
    nothing is quantised, as stored. CHECK_ROWS: some of the rows can't be read."""
    p_rows = row_pointers(rows, o_page, o_slot, PAGED)
    if FORMAT == PLAIN:
        b_stored = load_rows(p_rows, m_rows, DIM, BLOCK, PAGED or CHECK_ROWS, first)
    else:
        if FORMAT == INT4:
            b_pairs = load_rows(p_rows, m_rows, DIM // 2, BLOCK // 2, True, first // 2)
            b_stored = tl.interleave(b_pairs & 15, b_pairs >> 4).to(tl.float32)
        elif FORMAT == INT8:
            b_stored = load_rows(p_rows, m_rows, DIM, BLOCK, True, first).to(tl.float32)
        else:
            b_stored = fp8_to_fp32(load_rows(p_rows, m_rows, DIM, BLOCK, True, first), FORMAT)
        if zero is not None:
            b_stored -= load_per_row(zero, o_page, o_slot, m_rows, PAGED)[:, None]
        elif FORMAT == INT4:
            b_stored -= 8.0
    return b_stored
