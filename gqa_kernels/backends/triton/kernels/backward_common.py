"""Device helpers of the backward kernels."""

import triton
import triton.language as tl

from . import common, kv


@triton.jit
def load_lse(p_rows, m_rows):
    """LSE of rows. It is +inf, so that P is 0, if the row saw no key or does not exist."""
    b_lse = tl.load(p_rows, mask=m_rows, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)


@triton.jit
def row_products(
    p_a_rows,  # [A_ROWS] pointers to column 0
    m_a,  # [A_ROWS]
    p_b_rows,  # [B_ROWS]
    m_b,  # [B_ROWS]
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):
    """Products a . b of rows that take several chunks of columns: [A_ROWS, B_ROWS]."""
    b_product = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    for i_col in tl.static_range(0, DIM, BLOCK):
        b_a = kv.load_rows(p_a_rows, m_a, DIM, BLOCK, True, i_col)
        b_b = kv.load_rows(p_b_rows, m_b, DIM, BLOCK, True, i_col)
        b_product = tl.dot(b_a, tl.trans(b_b), b_product, input_precision="ieee")
    return b_product


@triton.jit
def probabilities(b_score, log2_scale, b_lse, EXACT: tl.constexpr):
    """exp(score - LSE) of a tile.

    The exponent is the forward's, ``fma(score, unit, -maximum)``, so that the score is rounded in
    the same way. A plain ``score - LSE`` would let the compiler fuse the subtraction with the
    product that made the score; P would then differ from the forward's in its last digits, the more
    the larger the scores. EXACT also subtracts what rounding took off ``LSE * LOG2E``, which 16
    bits hide and fp32 does not.
    """
    b_shift = b_lse * common.LOG2E
    b_exponent = tl.fma(b_score, common.exponent_unit(log2_scale), -b_shift)
    if EXACT:
        b_finite = tl.where(b_lse < float("inf"), b_lse, 0.0)  # inf - inf is NaN
        b_exponent -= tl.fma(b_finite, common.LOG2E, -(b_finite * common.LOG2E))
    return tl.exp2(b_exponent)


@triton.jit
def through_dropout(
    b_dp,  # gradient of what multiplied V
    m_keep,  # what dropout kept, or None
    dropout_scale,
):
    """Gradient of the probabilities; from it that of the scores as softmax takes them (capped,
    biased, masked) is ``P * (dP - delta)``, with the delta of `delta_kernel`."""
    if m_keep is not None:
        b_dp = tl.where(m_keep, b_dp * dropout_scale, 0.0)
    return b_dp


@triton.jit
def through_cap(b_ds, b_capped, softcap):
    """Gradient before the cap of one after it: cap * tanh(s / cap) has slope 1 - tanh^2."""
    if softcap is not None:
        b_tanh = b_capped / softcap
        b_ds = b_ds * (1.0 - b_tanh * b_tanh)
    return b_ds
