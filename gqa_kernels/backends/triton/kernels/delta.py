"""Backward, first step: what each row subtracts from its dP, from out and its gradient.

Grid    one program per block of BLOCK_M rows, a row being one (sequence, query head, token).
Program writes ``delta = rowsum(dout * out) - dlse``: with it, the gradient of a score is
        ``P * (dP - delta)``, for the output's and the LSE's gradient at once.

Source: FlashAttention-2 (arXiv 2307.08691), section 3.1 (there D); own code.
"""

import triton
import triton.language as tl

from . import kv


@triton.jit(do_not_specialize=["num_rows", "num_heads", "q_len"])
def delta_kernel(
    out,  # Rows [B, Hq, Sq, Dv]
    dout,  # Rows [B, Hq, Sq, Dv]
    p_dlse,  # [B, Hq, Sq] fp32, contiguous, or None
    p_delta,  # [B, Hq, Sq] fp32, contiguous
    num_rows,  # B * Hq * Sq
    num_heads,  # Hq
    q_len,  # Sq
    DIMS,  # Dims
    BLOCK_M: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_row < num_rows
    o_m = o_row % q_len
    o_head = o_row // q_len % num_heads
    o_b = o_row // q_len // num_heads
    # [BLOCK_M, BLOCK_DV]
    p_out_rows = kv.pointers(out, o_b, o_head, o_m)
    p_dout_rows = kv.pointers(dout, o_b, o_head, o_m)
    b_out = kv.load_rows(p_out_rows, m_rows, DIMS.DV, DIMS.BLOCK_DV, True).to(tl.float32)
    b_dout = kv.load_rows(p_dout_rows, m_rows, DIMS.DV, DIMS.BLOCK_DV, True).to(tl.float32)
    b_delta = tl.sum(b_out * b_dout, 1)  # [BLOCK_M]
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + o_row, mask=m_rows, other=0.0)
    tl.store(p_delta + o_row, b_delta, mask=m_rows)
