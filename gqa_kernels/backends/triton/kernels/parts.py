"""Which part of which sequence's keys a decode program has, if sequences are cut by their lengths.

Only the device knows the lengths. All sequences are cut into parts of about equally many blocks of
keys, so that one long sequence among short ones does not keep the device waiting. Every program
adds up the lengths and finds its part itself: no launch comes before, and the grid follows from
shapes alone. The rule is that of ``splits.py``, which says how many parts there are at most.
"""

import triton
import triton.language as tl

from .. import splits

MIN_BLOCKS_PER_SPLIT = tl.constexpr(splits.MIN_BLOCKS_PER_SPLIT)
CHUNK_B = tl.constexpr(128)  # sequences that a program looks at at once


@triton.jit
def blocks_of(lengths, o_b, batch, num_lengths, kv_len, most_blocks, BLOCK_N: tl.constexpr):
    """Blocks of keys of sequences, by their longest KV head: [CHUNK_B]."""
    p_lengths = lengths.ptr + o_b.to(tl.int64) * lengths.stride_b
    b_longest = tl.zeros([CHUNK_B], tl.int32)
    for i_head in tl.range(0, num_lengths):
        b_length = tl.load(p_lengths + i_head * lengths.stride_h, mask=o_b < batch, other=0)
        b_longest = tl.maximum(b_longest, b_length)
    return tl.minimum(tl.cdiv(tl.minimum(b_longest, kv_len), BLOCK_N), most_blocks)


@triton.jit
def find_part(
    lengths,  # PerHead [B, Hk] int32
    i_part,  # among the parts of all sequences
    batch,
    num_lengths,  # KV heads whose lengths may differ
    kv_len,
    even_parts,  # parts of all sequences, if none were rounded up
    most_blocks,  # of a sequence that its queries see
    BLOCK_N: tl.constexpr,
):
    """(sequence, split, number of its splits) of a part; sequence -1 if there is no such part."""
    blocks = tl.full([], 0, tl.int32)
    for i_first in tl.range(0, batch, CHUNK_B):
        o_b = i_first + tl.arange(0, CHUNK_B)
        b_blocks = blocks_of(lengths, o_b, batch, num_lengths, kv_len, most_blocks, BLOCK_N)
        blocks += tl.sum(b_blocks, 0)
    blocks_per_part = tl.maximum(tl.cdiv(blocks, even_parts), MIN_BLOCKS_PER_SPLIT)

    i_b, i_split, num_splits = tl.full([], -1, tl.int32), i_part * 0, i_part * 0
    earlier = tl.full([], 0, tl.int32)  # parts of earlier sequences
    for i_first in tl.range(0, batch, CHUNK_B):
        o_b = i_first + tl.arange(0, CHUNK_B)
        b_blocks = blocks_of(lengths, o_b, batch, num_lengths, kv_len, most_blocks, BLOCK_N)
        b_splits = tl.maximum(tl.cdiv(b_blocks, blocks_per_part), 1)
        b_splits = tl.where(o_b < batch, b_splits, 0)
        b_begin = earlier + tl.cumsum(b_splits, 0) - b_splits
        m_here = (b_begin <= i_part) & (i_part < b_begin + b_splits)  # of one sequence at most
        i_b = tl.maximum(i_b, tl.max(tl.where(m_here, o_b, -1), 0))
        i_split += tl.sum(tl.where(m_here, i_part - b_begin, 0), 0)
        num_splits += tl.sum(tl.where(m_here, b_splits, 0), 0)
        earlier += tl.sum(b_splits, 0)
    return i_b, i_split, num_splits
