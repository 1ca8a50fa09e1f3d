"""Keeps for the harness: parameters from tensors, and what the memory then holds."""

from __future__ import annotations

import torch

from gqa_kernels.cache.view import is_dynamic
from gqa_kernels.call.keep import KeepCall
from tests.cases.appends import SCALES

from .cuda_append import cache_params
from .cuda_harness import Call, Phase, Result
from .cuda_harness import compiled as compiled_phase
from .cuda_params import KeepParams, KeptSide


def keep_phase() -> Phase:
    return compiled_phase("sm80", "keep")


def make_keep_call(call: KeepCall) -> Call:
    """What the host code passes to the phase. A keep has no results, so ``out`` and ``lse`` are
    empty tensors."""
    view = call.kv
    params = KeepParams(cache=cache_params(view, 0, call.dtype))
    tensors = {"k": view.k, "v": view.v, "kv_lengths": view.kv_lengths,
               "indices": call.indices, "counts": call.counts}  # fmt: skip
    for name in (*SCALES, "page_table", "kv_begin"):
        if getattr(view, name) is not None:
            tensors[name] = getattr(view, name)
    for side in "kv":
        x = tensors[side]
        kept = KeptSide(
            data=x.data_ptr(),
            row_bytes=x.shape[3] * x.element_size(),
            element_bytes=x.element_size(),
        )
        for name in ("scale", "zero"):
            number = tensors.get(f"{side}_{name}")
            if number is not None and is_dynamic(number):
                setattr(kept, name, number.data_ptr())
        setattr(params, side, kept)
    params.indices, params.counts = call.indices.data_ptr(), call.counts.data_ptr()
    params.num_indices = call.indices.shape[2]
    for dim, stride in zip("bhn", call.indices.stride(), strict=True):
        setattr(params, f"index_stride_{dim}", stride)
    for dim, stride in zip("bh", call.counts.stride(), strict=True):
        setattr(params, f"count_stride_{dim}", stride)
    return Call(params, {**tensors, "out": torch.empty(0), "lse": torch.empty(0)})


def emulated_keep(call: KeepCall, phase: Phase | None = None, **options) -> Result:
    """Run a keep; ``options`` are of :meth:`Phase.run`."""
    result = (phase or keep_phase()).run(make_keep_call(call), **options)
    assert len(result.launches) <= 1
    return result
