"""From the tensors of an append to its kernel launch."""

from __future__ import annotations

from torch import Tensor

from ....cache.view import is_dynamic
from ....call.append import AppendCall
from ..configs import power_of_two
from ..kernels.append import append_kernel
from ..splits import ceil_div
from .base import Launch, dims_of, pages_of, per_head, rows_of, stored

BLOCK_T = 16  # most tokens of a program


def append_launch(call: AppendCall, rotated: Tensor | None) -> Launch | None:
    """The launch that writes an append's tokens, and its queries rotated into ``rotated``; None
    if there is nothing to write."""
    view, k_new, v_new = call.kv, call.k_new, call.v_new
    if view.batch == 0 or call.max_new == 0:
        return None
    q = None if rotated is None else call.q
    cos, packed = call.rotary_cos, call.new_offsets is not None
    num_heads = k_new.shape[1] + v_new.shape[1] + (0 if q is None else q.shape[1])
    block_t = min(BLOCK_T, power_of_two(call.max_new))
    num_blocks = ceil_div(call.max_new, block_t)
    arguments = {
        "q": rows_of(q, packed),
        "k_new": rows_of(k_new, packed),
        "v_new": rows_of(v_new, packed),
        "keys": stored(view.k, view.k_scale, view.k_zero),
        "values": stored(view.v, view.v_scale, view.v_zero),
        "rotated": rows_of(rotated, packed),
        "lengths": per_head(view.kv_lengths),
        "pages": pages_of(view.page_table, view.page_size),
        "p_begin": view.kv_begin,
        "p_new_offsets": call.new_offsets,
        "p_cos": cos,
        "p_sin": call.rotary_sin,
        "num_k_heads": k_new.shape[1],
        "num_v_heads": v_new.shape[1],
        "num_heads": num_heads,
        "num_blocks": num_blocks,
        "num_tokens": k_new.shape[2],
        "max_new": call.max_new,
        "num_pages": view.num_pages,
        "max_pages": view.max_pages,
        "max_position": 0 if cos is None else cos.shape[0],
        "DIMS": dims_of(k_new.shape[3], v_new.shape[3]),
        "BLOCK_T": block_t,
        "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1],
        "INTERLEAVED": call.rotary_interleaved,
        "DYNAMIC_K": view.k_scale is not None and is_dynamic(view.k_scale),
        "DYNAMIC_V": view.v_scale is not None and is_dynamic(view.v_scale),
        "PAGE_SIZE": view.page_size,
    }
    return Launch.of(append_kernel, view.batch * num_heads * num_blocks, arguments, 4, 1)
