"""From the tensors of an append to its kernel launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.view import is_dynamic
from ...call.append import AppendCall
from . import kv
from .append import append_kernel
from .configs import padded_dim, power_of_two
from .launch import FORMATS, Launch, strides_of
from .splits import ceil_div

BLOCK_T = 16  # most tokens of a program


def append_launch(call: AppendCall, rotated: Tensor | None) -> Launch | None:
    """The launch that writes an append's tokens, and its queries rotated into ``rotated``; None
    where there is nothing to write."""
    view, k_new, v_new = call.kv, call.k_new, call.v_new
    if view.batch == 0 or call.max_new == 0:
        return None
    q = None if rotated is None else call.q
    k, v, format = view.k, view.v, FORMATS.get(view.k.dtype, kv.PLAIN)
    if k.element_size() == 1 and k.dtype != torch.int8:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    heads = k_new.shape[1] + v_new.shape[1] + (0 if q is None else q.shape[1])
    block_t = min(BLOCK_T, power_of_two(call.max_new))
    num_blocks = ceil_div(call.max_new, block_t)
    arguments = {
        "p_q": q,
        "p_k_new": k_new,
        "p_v_new": v_new,
        "p_k": k,
        "p_v": v,
        "p_lengths": view.kv_lengths,
        "p_table": view.page_table,
        "p_begin": view.kv_begin,
        "p_new_offsets": call.new_offsets,
        "p_k_scale": view.k_scale,
        "p_v_scale": view.v_scale,
        "p_k_zero": view.k_zero,
        "p_v_zero": view.v_zero,
        "p_cos": call.rotary_cos,
        "p_sin": call.rotary_sin,
        "p_rotated": rotated,
        **strides_of("q", q, "bhm"),
        **strides_of("k_new_", k_new, "bhm"),
        **strides_of("v_new_", v_new, "bhm"),
        **strides_of("r", rotated, "bhm"),
        **strides_of("k", k, "phn"),
        **strides_of("v", v, "phn"),
        **strides_of("lengths_", view.kv_lengths, "bh"),
        **strides_of("table_", view.page_table, "bhp"),
        **strides_of("k_scale_", view.k_scale, "phn"),
        **strides_of("v_scale_", view.v_scale, "phn"),
        **strides_of("k_zero_", view.k_zero, "phn"),
        **strides_of("v_zero_", view.v_zero, "phn"),
        "num_k_heads": k_new.shape[1],
        "num_v_heads": v_new.shape[1],
        "num_heads": heads,
        "num_blocks": num_blocks,
        "num_tokens": k_new.shape[2],
        "max_new": call.max_new,
        "num_pages": view.num_pages,
        "max_pages": view.max_pages,
        "max_position": 0 if call.rotary_cos is None else call.rotary_cos.shape[0],
        "HEAD_DIM": k_new.shape[3],
        "VALUE_DIM": v_new.shape[3],
        "BLOCK_D": padded_dim(k_new.shape[3]),
        "BLOCK_DV": padded_dim(v_new.shape[3]),
        "BLOCK_T": block_t,
        "ROTARY_DIM": 0 if call.rotary_cos is None else 2 * call.rotary_cos.shape[1],
        "INTERLEAVED": call.rotary_interleaved,
        "FORMAT": format.value,
        "DYNAMIC_K": view.k_scale is not None and is_dynamic(view.k_scale),
        "DYNAMIC_V": view.v_scale is not None and is_dynamic(view.v_scale),
        "PAGE_SIZE": view.page_size,
    }
    if call.new_offsets is not None:  # the offsets say where a sequence begins
        arguments |= {"stride_qb": 0, "stride_k_new_b": 0, "stride_v_new_b": 0, "stride_rb": 0}
    return Launch(append_kernel, view.batch * heads * num_blocks, arguments, 4, 1)
