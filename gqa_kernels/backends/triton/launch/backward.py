"""From the tensors of a backward call to kernel launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..configs import (
    DeviceFacts,
    Tile,
    backward_kv_tile,
    backward_q_tile,
    heads_per_section,
    padded_dim,
)
from ..kernels.backward_kv import backward_kv_kernel
from ..kernels.backward_q import backward_q_kernel
from ..kernels.delta import delta_kernel
from ..plan import largest_first, num_groups, regrouped
from ..splits import ceil_div
from .base import Argument, Launch, dims_of, rows_of
from .forward import ForwardCall

DELTA_ELEMENTS = 4096  # of out that a program of the delta kernel reads


@dataclass(frozen=True)
class BackwardCall:
    """Tensors of a backward call, as the custom op takes them, with its outputs.

    Attributes:
        forward: the call it is the backward of, with its results.
        shared: V is grouped as K is.
        dout: ``[B, Hq, Sq, Dv]``.
        dlse: fp32 ``[B, Hq, Sq]``, contiguous, or None.
        delta: fp32 ``[B, Hq, Sq]``, contiguous, scratch.
        dq, dk, dv: in the shapes of q, k, v. Of packed sequences all of q, k, v and what has their
            shapes are ``[1, H, tokens, ...]``, and dq, dk, dv zeros.
        dslopes: fp32 ``[B, Hq, num_blocks]``, one sum per block of query tokens, or None.
        sinks: the sinks' gradient will be taken of delta.
    """

    forward: ForwardCall
    shared: bool
    dout: Tensor
    dlse: Tensor | None
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dslopes: Tensor | None
    sinks: bool = False

    @cached_property
    def exact_delta(self) -> Tensor | None:
        """Delta without the output's rounding, with ``dslopes`` or ``sinks``."""
        has_sums = self.dslopes is not None or self.sinks
        return torch.empty_like(self.delta) if has_sums else None

    def arguments(self) -> dict[str, Argument]:
        """The arguments that several kernels share; each launch takes those that it needs."""
        packed = self.forward.cache is not None
        return self.forward.arguments() | {
            "dout": rows_of(self.dout, packed),
            "p_dlse": self.dlse,
            "p_delta": self.delta,
            "p_exact_delta": self.exact_delta,
            "dq": rows_of(self.dq, packed),
            "dk": rows_of(self.dk, packed),
            "dv": rows_of(self.dv, packed),
            "p_dslopes": self.dslopes,
        }


def backward_launches(call: BackwardCall, facts: DeviceFacts) -> list[Launch]:
    """The launches of a call, in order."""
    shape = call.forward.shape
    launches = []
    if call.delta.numel():
        launches.append(delta_launch(call))
    if call.dk.numel() or call.dv.numel():
        launches += kv_launches(call, backward_kv_tile(shape, facts))
    if call.dq.numel():
        section = heads_per_section(shape, facts)
        launches.append(q_launch(call, backward_q_tile(shape, facts), section))
    return launches


def delta_launch(call: BackwardCall) -> Launch:
    """Launch of the delta kernel."""
    num_rows = call.delta.numel()
    block_m = max(1, DELTA_ELEMENTS // padded_dim(call.dout.shape[3]))
    # It takes packed tokens as one sequence.
    arguments = call.arguments() | {
        "out": rows_of(call.forward.out),
        "dout": rows_of(call.dout),
        "num_rows": num_rows,
        "q_len": call.delta.shape[2],
        "BLOCK_M": block_m,
    }
    return Launch.of(delta_kernel, ceil_div(num_rows, block_m), arguments, 4, 1)


def kv_launches(call: BackwardCall, tile: Tile) -> list[Launch]:
    """Launches that write dK and dV: one, or one each where V is grouped apart."""
    shape, plan = call.forward.shape, call.forward.plan
    if call.shared:
        if shape.head_dim <= tile.d_columns and shape.value_head_dim <= tile.dv_columns:
            return [_kv_launch(call, tile, plan)]
        return [_kv_launch(call, tile, plan, dv=None), _kv_launch(call, tile, plan, dk=None)]
    heads = shape.num_heads
    by_key = regrouped(call.forward.plan, heads, call.dk.shape[1], by_value=False)
    by_value = regrouped(call.forward.plan, heads, call.dv.shape[1], by_value=True)
    return [
        _kv_launch(call, tile, by_key, dv=None),
        _kv_launch(call, tile, by_value, dk=None),
    ]


def _kv_launch(call: BackwardCall, tile: Tile, plan: Tensor, **gradients: None) -> Launch:
    shape = call.forward.shape
    groups = num_groups(plan, shape.num_heads)
    num_blocks = ceil_div(shape.kv_len, tile.block_n)
    arguments = call.arguments() | {
        "p_plan": plan,
        "p_order": largest_first(plan, shape.num_heads),
        "batch": shape.batch,
        "num_groups": groups,
        "num_blocks": num_blocks,
        "DIMS": dims_of(shape.head_dim, shape.value_head_dim, tile),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SHARED": call.shared,
    }
    slices = tile.value_slices(shape) if "dk" in gradients else tile.key_slices(shape)
    grid = groups * shape.batch * num_blocks * slices
    return Launch.of(
        backward_kv_kernel, grid, arguments | gradients, tile.num_warps, tile.num_stages
    )


def q_launch(call: BackwardCall, tile: Tile, section: int) -> Launch:
    """Launch that writes dQ, ``section`` query heads side by side."""
    shape = call.forward.shape
    num_blocks = ceil_div(shape.q_len, tile.block_m)
    arguments = call.arguments() | {
        "num_blocks": num_blocks,
        "heads_per_section": section,
        "DIMS": dims_of(shape.head_dim, shape.value_head_dim, tile),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = shape.batch * shape.num_heads * num_blocks * tile.key_slices(shape)
    return Launch.of(backward_q_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def run_backward(
    call: BackwardCall, facts: DeviceFacts, need_slopes: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Run a call; returns the slopes' gradient ``[B, Hq]`` if needed, and ``call.exact_delta``."""
    if need_slopes:
        shape = call.forward.shape
        blocks = ceil_div(shape.q_len, backward_q_tile(shape, facts).block_m)
        partial = call.delta.new_zeros(shape.batch, shape.num_heads, blocks)
        call = replace(call, dslopes=partial)
    for launch in backward_launches(call, facts):
        launch.run()
    return call.dslopes.sum(-1) if need_slopes else None, call.exact_delta


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sinks ``[Hq]``: each row's is minus the sink's probability times delta.

    Args:
        sinks: fp32 ``[Hq]``.
        lse, delta: fp32 ``[B, Hq, Sq]``.
    """
    sees_key = lse != -torch.inf
    gradient = torch.exp(sinks[:, None] - lse) * delta
    return -gradient.where(sees_key, 0.0).sum((0, 2))
