"""Which probabilities dropout keeps, in registers: :mod:`gqa_kernels.native.dropout` defines it.

One call of Philox gives the four words of keys 4c .. 4c + 3 of a row, so a tile takes a quarter as
many calls as it has elements. Words are compared as signed integers: ``threshold`` is
``floor(dropout_p * 2**32) - 2**31``, which fits 32 bits whatever the probability.
"""

import triton
import triton.language as tl


@triton.jit
def _keep(words, threshold):
    sign = tl.full(words.shape, -(2**31), tl.int32)
    return (words.to(tl.int32, bitcast=True) ^ sign) >= threshold


@triton.jit
def keep_tile(
    p_seed,  # int64 [2]: seed, offset
    i_key,  # first key, a multiple of 4
    o_token,  # [ROWS] query tokens
    o_head,  # [ROWS] b * Hq + h
    threshold,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Boolean [ROWS, KEYS] tile."""
    o_four = (i_key // 4 + tl.arange(0, KEYS // 4))[None, :]
    c0 = o_four + tl.zeros([ROWS, 1], tl.int32)
    c1 = o_token[:, None] + tl.zeros([1, KEYS // 4], tl.int32)
    c2 = o_head[:, None] + tl.zeros([1, KEYS // 4], tl.int32)
    c3 = tl.full([ROWS, KEYS // 4], 0, tl.int32) + tl.load(p_seed + 1).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, KEYS / 4, 2, 2], lane = 2 a + b
    return _keep(tl.reshape(words, [ROWS, KEYS]), threshold)


@triton.jit
def keep_tile_keys_first(
    p_seed,  # int64 [2]: seed, offset
    i_key,  # first key, a multiple of 4
    o_token,  # [ROWS] query tokens
    i_head,  # b * Hq + h
    threshold,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The same tile transposed, [KEYS, ROWS], of one head."""
    o_four = (i_key // 4 + tl.arange(0, KEYS // 4))[:, None]
    c0 = o_four + tl.zeros([1, ROWS], tl.int32)
    c1 = o_token[None, :] + tl.zeros([KEYS // 4, 1], tl.int32)
    c2 = tl.full([KEYS // 4, ROWS], 0, tl.int32) + i_head
    c3 = tl.full([KEYS // 4, ROWS], 0, tl.int32) + tl.load(p_seed + 1).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [KEYS / 4, ROWS, 2, 2]
    return _keep(tl.reshape(tl.permute(words, [0, 2, 3, 1]), [KEYS, ROWS]), threshold)
