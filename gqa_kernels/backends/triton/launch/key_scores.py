"""From the tensors of a forward call, after its launches, to the launch that scores its keys."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..configs import Tile, padded_dim
from ..kernels.key_scores import key_scores_kernel
from ..plan import regrouped
from ..splits import ceil_div
from .base import Launch, dims_of
from .forward import ForwardCall

BLOCK_M = 16  # rows: tl.dot's least. The last queries are few
BLOCK_ELEMENTS = 64 * 128  # of the block of K that a program keeps
MAX_BLOCK_N = 128


def key_scores_launch(call: ForwardCall, key_scores: Tensor, queries: int) -> Launch | None:
    """Launch that writes ``key_scores`` fp32 ``[B, Hk, Sk]``, contiguous; None: it has no elements.

    Args:
        call: with its LSE.
        queries: last queries of each sequence that count.
    """
    if not key_scores.numel():
        return None
    batch, k_heads, slots = key_scores.shape
    plan = regrouped(call.plan, call.q.shape[1], k_heads, by_value=False)
    shape = call.shape
    block_n = max(16, min(MAX_BLOCK_N, BLOCK_ELEMENTS // padded_dim(shape.head_dim)))
    tile = Tile(BLOCK_M, block_n, 4, 1)
    num_blocks = ceil_div(slots, block_n)
    arguments = replace(call, plan=plan).arguments() | {
        "p_key_scores": key_scores,
        "num_blocks": num_blocks,
        "num_queries": queries,
        "DIMS": dims_of(shape.head_dim, shape.value_head_dim, tile),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = batch * k_heads * num_blocks
    return Launch.of(key_scores_kernel, grid, arguments, tile.num_warps, tile.num_stages)
