"""Calls that fail, devices and streams, captured graphs, and results by the emulator."""

from __future__ import annotations

import re

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.testing import assert_attention_close, make_inputs
from tests.cases import appends
from tests.cases.caches import Kind
from tests.emulation import cuda_harness
from tests.emulation.test_cuda_keep import keep_of

from . import checks
from .library import A100, B200, DEVICES, H100, NO_KERNEL_IMAGE, RTX_5090, SECOND_H100

BF16 = torch.bfloat16
UNEVEN = HeadMap([1, 0, 1, 1], num_kv_heads=3)
OUT_OF_MEMORY, LAUNCH_FAILURE, SYMBOL_NOT_FOUND = 2, 719, 500


def prefill_call(q_len: int = 150, kv_len: int = 150, batch: int = 8, **options):
    q, k, v = make_inputs(batch, UNEVEN, q_len, kv_len, 128, dtype=BF16)
    return attention_call(q, k, v, UNEVEN, **options)


def split_call():
    """A decode that is split, so that two kernels run."""
    q, k, v = make_inputs(1, UNEVEN, 1, 4000, 128, dtype=BF16)
    return attention_call(q, k, v, UNEVEN)


def run_backward(host, inputs):
    return host.backward(**checks.backward_inputs(inputs, use_lse=True)[1])


OPS = {
    "decode": (A100, lambda host: host.forward(split_call()), 2),
    "prefill on sm_80": (A100, lambda host: host.forward(prefill_call()), 1),
    "prefill on sm_90": (H100, lambda host: host.forward(prefill_call(causal=True)), 1),
    "backward": (
        A100,
        lambda host: run_backward(
            host, prefill_call(sinks=torch.zeros(4), alibi_slopes=torch.ones(4))
        ),
        5,
    ),
    "append": (A100, lambda host: host.append(appends.appends()), 1),
    "keep": (A100, lambda host: host.keep(keep_of(Kind(3), BF16, 16, 16)), 1),
}
NAMES = {
    "decode": ["sm80 decode", "sm80 decode combine"],
    "prefill on sm_80": ["sm80 prefill"],
    "prefill on sm_90": ["sm90 prefill"],
    "backward": [
        "sm80 backward, numbers", "sm80 backward, dK and dV", "sm80 backward, dQ",
        "sm80 backward, sinks", "sm80 backward, slopes",
    ],
    "append": ["sm80 append"],
    "keep": ["sm80 keep"],
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_a_failing_launch_is_named(host, name):
    """Each launch of each op: the kernel, what the runtime says, and no launch after it."""
    device, op, count = OPS[name]
    for n in range(count):
        message = rf"{NAMES[name][n]} failed: unspecified launch failure"
        with (
            host.recording(device, fail=("launch", n, LAUNCH_FAILURE)) as record,
            pytest.raises(RuntimeError, match=message),
        ):
            op(host)
        assert len(record.launches) == n + 1
        assert host.current_device == device.index


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("append", "keep")])
def test_a_failing_attribute_is_named(host, name):
    device, op, _ = OPS[name]
    inner = NAMES[name][1 if name == "backward" else 0]
    with (
        host.recording(device, fail=("attribute", 0, OUT_OF_MEMORY)) as record,
        pytest.raises(RuntimeError, match=f"{inner} failed: out of memory"),
    ):
        op(host)
    assert len(record.launches) == (1 if name == "backward" else 0)


@pytest.mark.parametrize("n, tensor", [(0, "q"), (1, "out"), (2, "k"), (3, "v")])
def test_a_failing_tensor_map_is_named(host, n, tensor):
    """With the tensor and the driver's number."""
    message = f"cuTensorMapEncodeTiled failed for {tensor} with CUresult 1"
    with (
        host.recording(H100, fail=("encode", n, 1)) as record,
        pytest.raises(RuntimeError, match=message),
    ):
        host.forward(prefill_call())
    assert not record.launches


def test_a_failing_memset_is_named(host):
    inputs = prefill_call(causal=True, q_len=600)
    with (
        host.recording(H100, fail=("memset", 0, LAUNCH_FAILURE)) as record,
        pytest.raises(RuntimeError, match=r"cudaMemsetAsync\(tile counter\) failed: unspecified"),
    ):
        host.forward(inputs)
    assert not record.launches


def test_a_kernel_without_code_for_the_device_is_named(host):
    with (
        host.recording(A100, fail=("launch", 0, NO_KERNEL_IMAGE)),
        pytest.raises(RuntimeError, match="sm80 prefill failed: no kernel image is available"),
    ):
        host.forward(prefill_call())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("current", [A100, RTX_5090])
def test_ops_run_on_the_device_of_their_tensors(host, name, current):
    """Whatever device is current: kernels, attributes, memsets, stream and workspace are of the
    tensors' device, and the current one is current again."""
    for device in (SECOND_H100, B200):
        with host.recording(device, current=current) as record:
            OPS[name][1](host)
        assert host.current_device == current.index
        assert record.launches
        for event in record.events:
            if event.kind in ("launch", "attribute", "memset"):
                assert event.device == device.index, event.kind
            if event.kind in ("launch", "memset"):
                assert event.stream == device.stream
            if event.kind == "allocate":
                assert event.value == device.index


def test_attributes_are_set_on_every_device(host):
    """Shared memory beyond 48 KiB must be allowed on each device apart: the fake refuses a launch
    otherwise."""
    inputs = prefill_call(batch=20)
    for device in (H100, SECOND_H100, A100, H100):
        checks.check_forward(host, inputs, device)


def test_tensors_on_two_devices_are_refused(host):
    inputs = prefill_call()
    with (
        host.recording(H100, elsewhere=(inputs.k,)) as record,
        pytest.raises(RuntimeError, match="k must be on cuda:1 as q is, got cuda:0"),
    ):
        host.forward(inputs)
    assert not record.launches


def test_devices_too_old_are_refused(host):
    old = DEVICES[0]._replace(index=9, capability=75)
    with host.recording(old):
        host._library.gqa_set_device(*old)
        with pytest.raises(RuntimeError, match=r"compute capability 8.0 or more, got 7.5"):
            host.forward(prefill_call())


def test_nothing_waits_for_the_device(host):
    """Not outside a capture either."""
    for device, op, _ in OPS.values():
        with host.recording(device) as record:
            op(host)
        assert not record.of("synchronize")


def test_the_merge_of_splits_reads_what_they_wrote(host):
    for device in (A100, H100):
        main, combine = checks.check_forward(host, split_call(), device).launches
        found, merged = checks.argument_of(main), checks.argument_of(combine)
        assert found.splits > 1
        assert (merged.partial_out, merged.partial_lse) == (found.partial_out, found.partial_lse)
        # From Hopper on it starts while the other one ends.
        assert (main.value, combine.value) == (0, device is H100)


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("q_len", [2, 140])
def test_results(host, device, q_len):
    """The launches of an op, executed by the emulator, write what the reference computes."""
    q, k, v = make_inputs(2, UNEVEN, q_len, 150, 64, dtype=BF16)
    inputs = attention_call(q, k, v, UNEVEN, causal=True)
    memory = [inputs.q, inputs.k, inputs.v, inputs.head_map_tensor]
    with host.recording(device, memory=memory) as record:
        out, lse = host.forward(inputs)
    assert record.launches
    assert_attention_close(out, q, k, v, UNEVEN, causal=True)
    assert torch.isfinite(lse).all()


def test_a_graph_reads_the_map_of_the_replay(host):
    """A captured launch is executed later: with the map that the memory then holds."""
    q, k, v = make_inputs(2, UNEVEN, 2, 90, 64, dtype=BF16)
    inputs = attention_call(q, k, v, torch.zeros(4, dtype=torch.int32))
    head_map = inputs.head_map_tensor
    memory = [inputs.q, inputs.k, inputs.v, head_map]
    with host.recording(A100, capture=True, memory=memory) as record:
        out, lse = host.forward(inputs)
    assert all(event.captured for event in record.launches)
    assert torch.isnan(out).all()  # nothing has run yet
    for entries in ([1, 0, 1, 1], [0, 2, 2, 1]):
        head_map.copy_(torch.tensor(entries))
        for event in record.launches:
            host.execute(event, [*memory, out, lse], {})
        assert_attention_close(out, q, k, v, HeadMap(entries, num_kv_heads=3))


def test_a_driver_without_tensor_maps_is_named(host, tmp_path):
    """In a library of its own: the product asks for the function once."""
    units = ("launch", "tensor_map", "bf16_d64")
    phase = cuda_harness.Phase("sm90", "prefill", units, folder=tmp_path)
    q, k, v = make_inputs(1, UNEVEN, 20, 20, 64, dtype=BF16)
    call = cuda_harness.make_call(attention_call(q, k, v, UNEVEN))
    for error, message in (
        (SYMBOL_NOT_FOUND, "the CUDA driver has no cuTensorMapEncodeTiled: it must be 12.0 or"),
        (OUT_OF_MEMORY, "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled) failed: out of"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            phase.run(call, fail=("symbol", error))
