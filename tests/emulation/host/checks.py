"""Runs a call through the host code and holds every launch to what it must be."""

from __future__ import annotations

import ctypes

import pytest
from torch import Tensor

from gqa_kernels.call.append import AppendCall
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.call.keep import KeepCall
from gqa_kernels.native import schema

from .. import cuda_append, cuda_backward, cuda_cache, cuda_harness, cuda_keep
from ..cuda_params import AttentionParams, KeepParams, Strides
from . import arguments, expected
from .library import Device, Event, Host, Record

STRUCTS = {
    "decode_kernel": arguments.DecodeArguments,
    "combine_kernel": arguments.DecodeArguments,
    "prefill_sm80_kernel": arguments.PrefillArguments,
    "14prefill_kernel": arguments.HopperArguments,
    "backward_": arguments.BackwardArguments,
    "append_kernel": arguments.AppendArguments,
    "keep_kernel": KeepParams,
}
OUTPUTS = ("out", "lse")


def check_forward(host: Host, inputs: AttentionCall, device: Device, **recording) -> Record:
    """Attention, dense or over a cache."""
    cached = inputs.memory != "dense"
    call = cuda_cache.make_cache_call(inputs) if cached else cuda_harness.make_call(inputs)
    with host.recording(device, **recording) as record:
        out, lse = host.forward(inputs)
    wanted = call.params
    _put_outputs(wanted, out, lse)
    _fill_in(wanted, inputs)
    launches = expected.forward(wanted, device)
    check_launches(record, launches, device, bool(recording.get("capture")))
    for event, launch in zip(record.launches, launches, strict=True):
        found = argument_of(event)
        assert arguments.differences(found.call, wanted) == []
        if isinstance(found, arguments.HopperArguments):
            check_tensor_maps(found, launch)
            check_counter(record, event, found, launch)
    return record


def check_backward(
    host: Host, call: cuda_harness.Call, inputs: dict[str, object], device: Device, **recording
) -> Record:
    """Gradients; ``call`` is what the host code must make of the ``inputs`` of the op."""
    with host.recording(device, **recording) as record:
        found = host.backward(**inputs)
    params = call.params
    for name, x in zip(("dq", "dk", "dv"), found[:3], strict=True):
        setattr(params, name, x.data_ptr())
        b, h, s = x.stride()[:3]
        packed = params.call.q_offsets and name != "dq"
        setattr(params, f"{name}_stride", Strides(0 if packed else b, h, s))
    for name, x in zip(("dslopes", "dsinks"), found[3:], strict=True):
        setattr(params, name, x.data_ptr() if x.numel() else None)
    launches = expected.backward(params)
    check_launches(record, launches, device, bool(recording.get("capture")))
    for event in record.launches:
        # Which of dk and dv a launch writes is among its own fields.
        assert arguments.differences(argument_of(event).params, params, "dk", "dv") == []
    return record


def check_append(host: Host, inputs: AppendCall, device: Device, **recording) -> Record:
    """An append. Nothing executes it: the cache stays as it is."""
    params = cuda_append.make_append_call(inputs).params
    with host.recording(device, **recording) as record:
        rotated = host.append(inputs)
    if params.q:
        params.q_rotated = rotated.data_ptr()
        params.q_rotated_stride = Strides(*rotated.stride()[:3])
    if inputs.new_offsets is not None:
        params.new_offsets = inputs.new_offsets.data_ptr()
    launches = expected.append(params)
    check_launches(record, launches, device, bool(recording.get("capture")))
    for event in record.launches:
        found = argument_of(event).params
        ignored = [name for name, _ in arguments.values(found) if _is_unused_by_append(name)]
        assert arguments.differences(found, params, *ignored) == []
    return record


def check_keep(host: Host, inputs: KeepCall, device: Device, **recording) -> Record:
    """A keep. Nothing executes it: the cache stays as it is."""
    params = cuda_keep.make_keep_call(inputs).params
    with host.recording(device, **recording) as record:
        host.keep(inputs)
    launches = expected.keep(params)
    check_launches(record, launches, device, bool(recording.get("capture")))
    for event in record.launches:
        found = argument_of(event)
        ignored = [name for name, _ in arguments.values(found) if _is_unused_by_keep(name)]
        assert arguments.differences(found, params, *ignored) == []
    return record


def backward_inputs(inputs: AttentionCall, use_lse: bool) -> tuple[cuda_harness.Call, dict]:
    """A dense backward: what the host code must make of it, and the op's arguments by name."""
    call = cuda_backward.make_backward_call(inputs, use_lse)
    _fill_in(call.params.call, inputs)
    named = dict(zip(schema.FORWARD.names, schema.FORWARD.arguments_of(inputs), strict=True))
    tensors = call.tensors
    given = {name: named[name] for name in schema.BACKWARD.names if name in named}
    given |= {"dout": tensors["dout"], "dlse": tensors.get("dlse"), "out": call.out,
              "lse": call.lse, "need_slopes": inputs.alibi_slopes is not None,
              "need_sinks": inputs.sinks is not None}  # fmt: skip
    return call, given


def check_launches(
    record: Record, launches: list[expected.Launch], device: Device, captured: bool
) -> None:
    """Kernels, grids, shared memory, streams and workspaces."""
    assert [event.name for event in record.launches] == [
        next((event.name for event in record.launches if _matches(event, launch)), launch.kernel)
        for launch in launches
    ]
    for event, launch in zip(record.launches, launches, strict=True):
        assert _matches(event, launch), (event.name, launch.kernel)
        assert event.grid == (*launch.grid, 1), launch.kernel
        assert event.block == (launch.block, 1, 1) and event.cluster == (1, 1, 1)
        assert event.shared_bytes == launch.shared <= device.shared_limit, launch.kernel
        assert (event.device, event.stream) == (device.index, device.stream)
        assert event.captured == captured
        check_fields(event, launch)
        check_workspace(record, event, launch)


def check_fields(event: Event, launch: expected.Launch) -> None:
    found = dict(arguments.values(argument_of(event)))
    for name, value in launch.fields.items():
        same = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert found[name] == same, (launch.kernel, name)


def check_workspace(record: Record, event: Event, launch: expected.Launch) -> None:
    """It is allocated, not freed yet, and large enough for all that kernels write."""
    found = dict(arguments.values(argument_of(event)))
    live = record.live(event)
    for name, (offset, size) in launch.workspace.items():
        start = found[name] - offset
        assert start in live, f"{launch.kernel}: {name} is not in memory that is allocated"
        assert offset + size <= live[start], f"{launch.kernel}: {name} reaches beyond its memory"


def check_tensor_maps(found: arguments.HopperArguments, launch: expected.Launch) -> None:
    block_n = int(launch.kernel[2].split("Li")[2].rstrip("E"))
    for name, wanted in expected.tensor_maps(found.call, block_n).items():
        tensor_map = getattr(found, name)
        assert tensor_map.magic == b"GQA-TMAP"[: len(tensor_map.magic)]
        assert tensor_map.address == getattr(found.call, name)
        assert tuple(tensor_map.dims[:4]) == wanted["dims"], name
        assert tuple(tensor_map.strides[:3]) == wanted["strides"], name
        assert tensor_map.box == wanted["box"], name
        assert cuda_harness.SWIZZLES[tensor_map.swizzle] == "128B" and tensor_map.nan_fill == 0


def check_counter(
    record: Record, event: Event, found: arguments.HopperArguments, launch: expected.Launch
) -> None:
    """The counter of tiles is set to 0 before the launch, on the same stream."""
    memsets = record.of("memset")
    if "schedule.counter" not in launch.workspace:
        assert not memsets
        return
    (memset,) = memsets
    assert record.events.index(memset) < record.events.index(event)
    assert (memset.address, memset.bytes, memset.value) == (found.schedule.counter, 4, 0)
    assert (memset.stream, memset.captured) == (event.stream, event.captured)


def argument_of(event: Event) -> ctypes.Structure:
    """A launch's argument as a struct."""
    kind = next(kind for name, kind in STRUCTS.items() if name in event.name)
    return arguments.parse(kind, event.arguments)


def _matches(event: Event, launch: expected.Launch) -> bool:
    """Whether the parts of a kernel's name occur in order."""
    rest = event.name
    for part in launch.kernel:
        _, found, rest = rest.partition(part)
        if not found:
            return False
    return True


def _put_outputs(params: AttentionParams, out: Tensor, lse: Tensor) -> None:
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    params.out_stride = Strides(*out.stride()[:3])


def _fill_in(params: AttentionParams, inputs: AttentionCall) -> None:
    """What the harness leaves out because kernels don't read it without a page table, and what
    it copies."""
    if not params.page_table:
        params.num_pages, params.page_size, params.max_pages = params.batch, params.kv_len, 1
    for side in ("window_left", "window_right"):  # wider than all tokens: no window
        if getattr(params, side) >= params.q_len + params.kv_len:
            setattr(params, side, -1)
    params.head_map = inputs.head_map_tensor.data_ptr()
    if inputs.value_head_map_tensor is not None:
        params.value_head_map = inputs.value_head_map_tensor.data_ptr()


def fill_in_packed(params: AttentionParams, inputs: AttentionCall) -> None:
    """The same for packed sequences, which share one row of K and V."""
    _fill_in(params, inputs)
    params.k_stride.b = params.v_stride.b = 0


def _is_unused_by_keep(name: str) -> bool:
    """Fields of ``cache`` that describe queries, scores and numbers (keep_params.h)."""
    unused = ("cache.k_scale", "cache.v_scale", "cache.k_zero", "cache.v_zero")
    is_stride = name.startswith(tuple(f"{x}_stride" for x in unused))
    used_too = name in ("cache.k_stride.b", "cache.num_k_heads") or is_stride
    return not used_too and (_is_unused_by_append(name) or name == "cache.dtype")


def _is_unused_by_append(name: str) -> bool:
    """Fields of ``cache`` that describe queries and scores (append_params.h)."""
    unused = ("cache.q", "cache.out", "cache.lse", "cache.head_map", "cache.scale", "cache.window",
              "cache.dropout", "cache.mask", "cache.k_scale", "cache.v_scale")  # fmt: skip
    return name.startswith(unused) or name in ("cache.k", "cache.v", "cache.k_zero", "cache.v_zero")
