"""Appends for the harness: parameters from tensors, and what the memory then holds."""

from __future__ import annotations

import torch

from gqa_kernels.cache.view import KVView, is_dynamic
from gqa_kernels.call.append import AppendCall
from tests.cases.appends import SCALES

from .cuda_harness import Call, Phase, Result
from .cuda_harness import compiled as compiled_phase
from .cuda_params import DTYPES, AppendParams, AttentionParams, Strides


def append_phase() -> Phase:
    return compiled_phase("sm80", "append")


def cache_params(view: KVView, num_heads: int, dtype: torch.dtype) -> AttentionParams:
    """A cache without queries; ``dtype`` is that of new tokens."""
    params = AttentionParams(
        batch=view.batch,
        num_heads=num_heads,
        num_k_heads=view.num_k_heads,
        num_v_heads=view.num_v_heads,
        kv_len=view.capacity,
        head_dim=view.head_dim,
        value_head_dim=view.value_head_dim,
        dtype=DTYPES.index(dtype),
        k_dtype=DTYPES.index(view.k.dtype),
        v_dtype=DTYPES.index(view.v.dtype),
        num_pages=view.num_pages,
        page_size=view.page_size,
        max_pages=view.max_pages,
        kv_lengths=view.kv_lengths.data_ptr(),
        kv_lengths_stride_b=view.kv_lengths.stride(0),
        kv_lengths_stride_h=view.kv_lengths.stride(1),
    )
    if view.page_table is not None:
        params.page_table = view.page_table.data_ptr()
        for dim, stride in zip("bhp", view.page_table.stride(), strict=True):
            setattr(params, f"page_table_stride_{dim}", stride)
    if view.kv_begin is not None:
        params.kv_begin = view.kv_begin.data_ptr()
    for name in ("k", "v", *SCALES):
        x = getattr(view, name)
        if x is not None:
            setattr(params, f"{name}_stride", Strides(*x.stride()[:3]))
    return params


def make_append_call(inputs: AppendCall) -> Call:
    """What the host code passes to the phase; ``out`` is the rotated queries, full of NaN, ``lse``
    an empty tensor."""
    view = inputs.kv
    q = inputs.q if inputs.rotary_cos is not None else None
    tensors = {
        "k": view.k, "v": view.v, **{name: getattr(view, name) for name in SCALES},
        "k_new": inputs.k_new, "v_new": inputs.v_new, "q": q,
        "q_rotated": None if q is None else torch.full_like(q, torch.nan),
        "new_offsets": inputs.new_offsets, "rotary_cos": inputs.rotary_cos,
        "rotary_sin": inputs.rotary_sin,
    }  # fmt: skip
    tensors = {name: x for name, x in tensors.items() if x is not None}
    params = AppendParams(
        cache=cache_params(view, 0 if inputs.q is None else inputs.q.shape[1], inputs.dtype),
        num_tokens=inputs.k_new.shape[2],
        dtype=DTYPES.index(inputs.dtype),
        rotary_interleaved=inputs.rotary_interleaved,
    )
    for name, x in tensors.items():
        setattr(params, name, x.data_ptr())
    for name in ("q", "q_rotated", "k_new", "v_new"):
        if name in tensors:
            setattr(params, f"{name}_stride", Strides(*tensors[name].stride()[:3]))
    for side in "kv":
        scale = getattr(view, f"{side}_scale")
        setattr(params, f"{side}_dynamic", scale is not None and is_dynamic(scale))
    if inputs.rotary_cos is not None:
        params.rotary_positions, half = inputs.rotary_cos.shape
        params.rotary_dim = 2 * half
        for name in ("cos", "sin"):
            table = tensors[f"rotary_{name}"]
            setattr(params, f"{name}_stride", table.stride(0))
            setattr(params, f"{name}_dtype", DTYPES.index(table.dtype))
    tensors["kv_lengths"] = view.kv_lengths
    for name in ("page_table", "kv_begin"):
        if getattr(view, name) is not None:
            tensors[name] = getattr(view, name)
    tensors["out"], tensors["lse"] = tensors.get("q_rotated", torch.empty(0)), torch.empty(0)
    return Call(params, tensors)


def emulated_append(inputs: AppendCall, phase: Phase | None = None, **options) -> Result:
    """Run an append; ``options`` are of :meth:`Phase.run`. ``out`` is the rotated queries."""
    result = (phase or append_phase()).run(make_append_call(inputs), **options)
    assert len(result.launches) <= 1
    return result
