"""Keep: move the rows of the kept keys of a cache to the front of their sequence.

Grid    one program per (sequence, head), flattened; the heads are those of K, then of V.
Program moves BLOCK_N rows at a time, in the order of the keys: key indices[i] becomes key i.
        Indices ascend, so a row is read before another is written over it. Within a block the
        barrier between loads and stores ensures that. Rows are integers of the storage's width
        here, whatever the format; scales and zeros of each row's own move with them.
"""

import triton
import triton.language as tl

from . import kv


@triton.jit
def place(pages, p_table, num_pages, max_pages, i_b, begin, o_n, m_n, PAGE_SIZE: tl.constexpr):
    """(page, slot in it, key has a page) of keys: int64 [BLOCK_N] each."""
    o_slot = o_n.to(tl.int64) + begin
    o_entry = o_slot // PAGE_SIZE
    m_n = m_n & (o_entry < max_pages)
    o_page = tl.zeros(o_slot.shape, tl.int64) + i_b
    if pages is not None:
        o_page = tl.load(p_table + o_entry * pages.stride_p, mask=m_n, other=-1).to(tl.int64)
    m_n = m_n & (o_page >= 0) & (o_page < num_pages)
    return o_page, o_slot % PAGE_SIZE, m_n


@triton.jit
def move_rows(
    stored,  # Stored
    i_head,
    o_from,  # [BLOCK_N] page of each row, and its slot
    o_from_slot,
    o_to,
    o_to_slot,
    m_n,  # [BLOCK_N]
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOVE_SCALE: tl.constexpr,
):
    """Move rows of one head of K or V."""
    o_cols = tl.arange(0, BLOCK_D)
    m_tile = m_n[:, None] & (o_cols < DIM)[None, :]
    p_from = kv.pointers(stored.rows, o_from, i_head, o_from_slot)
    p_to = kv.pointers(stored.rows, o_to, i_head, o_to_slot)
    b_rows = tl.load(p_from[:, None] + o_cols[None, :], mask=m_tile, other=0)
    if MOVE_SCALE:
        b_scale = tl.load(kv.pointers(stored.scale, o_from, i_head, o_from_slot), mask=m_n)
        if stored.zero is not None:
            b_zero = tl.load(kv.pointers(stored.zero, o_from, i_head, o_from_slot), mask=m_n)
    # Other warps may still read the rows that this one is about to overwrite.
    tl.debug_barrier()
    tl.store(p_to[:, None] + o_cols[None, :], b_rows, mask=m_tile)
    if MOVE_SCALE:
        tl.store(kv.pointers(stored.scale, o_to, i_head, o_to_slot), b_scale, mask=m_n)
        if stored.zero is not None:
            tl.store(kv.pointers(stored.zero, o_to, i_head, o_to_slot), b_zero, mask=m_n)


@triton.jit(
    do_not_specialize=["num_k_heads", "num_v_heads", "num_indices", "num_pages", "max_pages"]
)
def keep_kernel(
    indices,  # Rows [B, Hk, n] int32
    counts,  # PerHead [B, Hk] int32
    keys,  # Stored [P, Hk, page_size, DIM_K], of integers
    values,  # Stored [P, Hv, page_size, DIM_V]
    lengths,  # PerHead [B, Hk] int32
    pages,  # Pages, or None
    p_begin,  # [B] int32, or None
    num_k_heads,
    num_v_heads,
    num_indices,
    num_pages,
    max_pages,
    DIM_K: tl.constexpr,  # elements of a row
    DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOVE_K_SCALE: tl.constexpr,
    MOVE_V_SCALE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    # Program id -> sequence and head. If value heads differ from key heads in number, all share
    # one table row, length and list of indices.
    i_program = tl.program_id(0)
    i_head = i_program % (num_k_heads + num_v_heads)
    i_b = (i_program // (num_k_heads + num_v_heads)).to(tl.int64)
    is_key = i_head < num_k_heads
    i_side_head = tl.where(is_key, i_head, i_head - num_k_heads).to(tl.int64)
    i_row = tl.where(is_key | (num_v_heads == num_k_heads), i_side_head, 0)

    begin = 0
    if p_begin is not None:
        begin = tl.load(p_begin + i_b)
    length = tl.load(lengths.ptr + i_b * lengths.stride_b + i_row * lengths.stride_h)
    length = tl.minimum(length, max_pages * PAGE_SIZE - begin)
    count = tl.load(counts.ptr + i_b * counts.stride_b + i_row * counts.stride_h)
    count = tl.minimum(tl.minimum(count, num_indices), length)
    p_index = indices.ptr + i_b * indices.stride_b + i_row * indices.stride_h
    p_table = None
    if pages is not None:
        p_table = pages.ptr + i_b * pages.stride_b + i_row * pages.stride_h

    for i_n in range(0, count, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < count
        o_key = tl.load(p_index + o_n.to(tl.int64) * indices.stride_n, mask=m_n, other=-1)
        m_n = m_n & (o_key >= 0) & (o_key < length)
        o_key = tl.maximum(o_key, 0)
        o_from, o_from_slot, m_from = place(
            pages, p_table, num_pages, max_pages, i_b, begin, o_key, m_n, PAGE_SIZE
        )
        o_to, o_to_slot, m_to = place(
            pages, p_table, num_pages, max_pages, i_b, begin, o_n, m_n, PAGE_SIZE
        )
        m_n = m_from & m_to
        if is_key:
            move_rows(
                keys,
                i_side_head,
                o_from,
                o_from_slot,
                o_to,
                o_to_slot,
                m_n,
                DIM_K,
                BLOCK_K,
                MOVE_K_SCALE,
            )
        else:
            move_rows(
                values,
                i_side_head,
                o_from,
                o_from_slot,
                o_to,
                o_to_slot,
                m_n,
                DIM_V,
                BLOCK_V,
                MOVE_V_SCALE,
            )
