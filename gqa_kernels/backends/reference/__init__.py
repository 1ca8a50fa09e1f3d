"""Reference backend, eager torch: the definition of correct for every other backend.

formula.py  attention over dense tensors
cache.py    attention over any view, and the append
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cache.tensors import DTYPES
from ...call.append import AppendCall
from ...call.attention import AttentionCall
from ...call.keep import KeepCall
from ...native.autograd import autocast_dtype
from ...native.schema import APPEND, KEEP
from ..base import ALL_CACHES, ALL_OPTIONS, Backend, Capabilities
from .cache import append_op, keep_op, reference_cache_attention
from .formula import reference_attention


class ReferenceBackend(Backend):
    name = "reference"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda", "mps", "xpu", "meta"}),
        dtypes=frozenset(DTYPES),
        max_head_dim=1 << 16,
        options=ALL_OPTIONS,
        autograd=True,
        caches=ALL_CACHES,
        cache_autograd=True,
    )

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        call.check()
        attention: Callable[[AttentionCall], tuple[Tensor, Tensor]] = reference_attention
        if call.memory != "dense":
            attention = reference_cache_attention
        if autocast_dtype(call.q) is None:
            out, lse = attention(call)
        else:  # which would round the reference's fp32 products
            with torch.autocast(call.device.type, enabled=False):
                out, lse = attention(call)
        if call.bshd:
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, lse

    def append(self, call: AppendCall) -> Tensor | None:
        call.check()
        rotated = append_op(*APPEND.arguments_of(call))
        return call.q if call.rotated_q is None else rotated

    def keep(self, call: KeepCall) -> None:
        keep_op(*KEEP.arguments_of(call))
