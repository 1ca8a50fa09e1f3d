"""From the tensors of a keep to its kernel launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ....cache.view import is_dynamic
from ....call.keep import KeepCall
from ..configs import power_of_two
from ..kernels import kv
from ..kernels.arguments import Stored
from ..kernels.keep import keep_kernel
from .base import Launch, pages_of, per_head, rows_of

BLOCK_N = 16  # rows that a program moves at once
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def keep_launch(call: KeepCall) -> Launch | None:
    """The launch that moves the kept keys; None if there is nothing to move."""
    view, num_indices = call.kv, call.indices.shape[2]
    if view.batch == 0 or num_indices == 0:
        return None
    dim_k, dim_v = view.k.shape[3], view.v.shape[3]
    arguments = {
        "indices": rows_of(call.indices),
        "counts": per_head(call.counts),
        "keys": _as_integers(view.k, view.k_scale, view.k_zero),
        "values": _as_integers(view.v, view.v_scale, view.v_zero),
        "lengths": per_head(view.kv_lengths),
        "pages": pages_of(view.page_table, view.page_size),
        "p_begin": view.kv_begin,
        "num_k_heads": view.num_k_heads,
        "num_v_heads": view.num_v_heads,
        "num_indices": num_indices,
        "num_pages": view.num_pages,
        "max_pages": view.max_pages,
        "DIM_K": dim_k,
        "DIM_V": dim_v,
        "BLOCK_K": power_of_two(dim_k),
        "BLOCK_V": power_of_two(dim_v),
        "BLOCK_N": BLOCK_N,
        "MOVE_K_SCALE": view.k_scale is not None and is_dynamic(view.k_scale),
        "MOVE_V_SCALE": view.v_scale is not None and is_dynamic(view.v_scale),
        "PAGE_SIZE": view.page_size,
    }
    heads = view.num_k_heads + view.num_v_heads
    return Launch.of(keep_kernel, view.batch * heads, arguments, 4, 1)


def _as_integers(x: Tensor, scale: Tensor | None, zero: Tensor | None) -> Stored:
    """K or V for the kernel, as integers of the width of its elements."""
    return Stored(rows_of(x.view(_INTEGERS[x.element_size()])), rows_of(scale), rows_of(zero),
                  kv.PLAIN)  # fmt: skip
