"""Flop counts of the ops, for ``torch.utils.flop_counter.FlopCounterMode``.

Counts follow torch's conventions for SDPA: a multiplication and an addition are two flops, forward
is two matrix products and backward five, and nothing is subtracted for causality, windows or masks.
Every query head counts, as in SDPA over expanded K and V. The number of keys is the sequence's
length if its value is known, else the largest possible one.

Importing torch's counter imports Triton, which takes longer than the rest of this package. So the
formulas are registered only when a counter exists: before an op runs under a dispatch mode."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .schema import Schema, value_head_dim

_formulas: dict[Any, Callable[..., int]] = {}  # op -> formula


def register(op: str, schema: Schema, *, is_backward: bool = False) -> None:
    """Count the flops of the attention op ``gqa_kernels::op`` with these arguments."""

    def formula(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        call = schema.Arguments(*arguments, **named)
        head_dim, value_dim = call.q.shape[3], value_head_dim(call.v)
        # Backward computes the scores, dQ and dK over D, and dP and dV over Dv.
        columns = 3 * head_dim + 2 * value_dim if is_backward else head_dim + value_dim
        return 2 * columns * _scores(call)

    _formulas[getattr(torch.ops.gqa_kernels, op)] = formula


def enter_formulas() -> None:
    """Make existing and future counters count the registered ops."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    module.flop_registry.update(_formulas)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry.update(_formulas)


def _scores(call: Any) -> int:
    """The number of (query, key) pairs within sequences, summed over query heads."""
    q, heads = call.q, call.q.shape[1]
    offsets = getattr(call, "q_offsets", None)  # the short op has none
    if offsets is None:
        queries = [q.shape[2]] * q.shape[0]
    elif _has_values(offsets):
        queries = offsets.diff().tolist()
    else:
        queries = [call.max_q_len] * (offsets.shape[0] - 1)
    keys = _keys(call, heads)
    if isinstance(keys, list):
        return sum(tokens * most for tokens, most in zip(queries, keys, strict=True))
    return sum(queries) * keys


def _keys(call: Any, heads: int) -> list[int] | int:
    """Keys of each sequence, summed over its query heads; one number if all are equal."""
    lengths = getattr(call, "kv_lengths", None)
    if lengths is not None and _has_values(lengths):
        plan = getattr(call, "plan", None)  # Triton's: permutation, then key heads of query heads
        key_heads = call.head_map if plan is None else plan[heads : 2 * heads]
        key_heads = key_heads.long().clamp(0, lengths.shape[1] - 1)
        return lengths.long()[:, key_heads].sum(1).tolist()
    if getattr(call, "q_offsets", None) is not None:
        return heads * call.max_kv_len
    table = getattr(call, "page_table", None)  # backward ops have none
    return heads * call.k.shape[2] * (1 if table is None else table.shape[2])


def _has_values(x: Tensor) -> bool:
    return x.device.type != "meta" and not isinstance(x, (FakeTensor, FunctionalTensor))
