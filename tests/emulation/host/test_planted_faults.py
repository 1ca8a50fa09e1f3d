"""Faults planted into the host code, and the check that notices each.

A fault is a change of the sources. The library is compiled with it, and the test that must fail is
run in a process of its own: the ops of two libraries can't be in one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.emulation import compiled_units

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        compiled_units.unavailable_reason() is not None,
        reason=str(compiled_units.unavailable_reason()),
    ),
]

LAUNCHES, ERRORS = "test_launches.py", "test_errors_and_devices.py"


class Fault(NamedTuple):
    """A change, and the test that must fail with it: its file, a part of its name, its message."""

    path: str
    old: str
    new: str
    file: str
    test: str
    message: str


FAULTS = {
    "the stream is looked up where Python's torch is not": Fault(
        "host/stream_lookup_cuda.cpp", "library != nullptr ? library : RTLD_DEFAULT",
        "RTLD_DEFAULT", LAUNCHES, "test_output_alone", "this torch was built without CUDA",
    ),
    "the default stream instead of torch's": Fault(
        "host/attention_cuda.cpp", "current_stream(index));", "nullptr);",
        ERRORS, "test_ops_run_on_the_device_of_their_tensors", "event.stream == device.stream",
    ),
    "the default stream while another is captured": Fault(
        "host/append_cuda.cpp", "current_stream(index));", "nullptr);",
        LAUNCHES, "test_append[dense-capture]", "would make the legacy stream depend",
    ),
    "another device's stream": Fault(
        "host/backward_cuda.cpp", "current_stream(index));", "current_stream(0));",
        ERRORS, "test_ops_run_on_the_device_of_their_tensors", "invalid resource handle",
    ),
    "another stream of the same device": Fault(
        "host/append_cuda.cpp", "current_stream(index));",
        "reinterpret_cast<cudaStream_t>(reinterpret_cast<char*>(current_stream(index)) + 0x1000));",
        LAUNCHES, "test_append[dense-eager]", "device.stream",
    ),
    "a keep on the default stream": Fault(
        "host/keep_cuda.cpp", "current_stream(index));", "nullptr);",
        LAUNCHES, "test_keep[dense-capture]", "would make the legacy stream depend",
    ),
    "a keep that moves as many bytes of a value as a key has": Fault(
        "cuda/sm80/keep/keep.cu", "std::max(params.k.row_bytes, params.v.row_bytes)",
        "params.k.row_bytes",
        LAUNCHES, "test_keep[dense-eager]", "event.grid",
    ),
    "no device guard": Fault(
        "host/attention_cuda.cpp",
        "const torch::stable::accelerator::DeviceGuard guard(index);", "",
        ERRORS, "test_ops_run_on_the_device_of_their_tensors", "invalid resource handle",
    ),
    "facts of the first device for all": Fault(
        "cuda/device.cpp", "Device& device = known[index];", "Device& device = known[0];",
        ERRORS, "test_attributes_are_set_on_every_device", "event.grid",
    ),
    "a workspace freed before the launch": Fault(
        "host/attention_cuda.cpp",
        "cuda::attention_forward(params, phase, workspace.mutable_data_ptr(), device,",
        "void* data = workspace.mutable_data_ptr();\n  workspace = in.q;\n"
        "  cuda::attention_forward(params, phase, data, device,",
        ERRORS, "test_the_merge_of_splits_reads_what_they_wrote", "not in memory that is allocated",
    ),
    "a workspace without room for the LSE": Fault(
        "cuda/sm80/decode/launch.cu", "(params.partial_stride + 1);", "params.partial_stride;",
        ERRORS, "test_the_merge_of_splits_reads_what_they_wrote", "reaches beyond its memory",
    ),
    "tiles in the y dimension of the grid": Fault(
        "cuda/sm80/append/append.cu", "dim3((args.rows - 1) / rows_per_cta + 1)",
        "dim3(1, (args.rows - 1) / rows_per_cta + 1)",
        LAUNCHES, "test_grids_stay_within_limits", "invalid configuration argument",
    ),
    "sequences in the y dimension of the grid": Fault(
        "cuda/sm80/backward/row_stats.cu",
        'backward_slopes_kernel, dim3(ctas)', 'backward_slopes_kernel, dim3(1, ctas)',
        LAUNCHES, "test_backward[alibi-bf16]", "event.grid",
    ),
    "the counter of tiles is not reset": Fault(
        "cuda/sm90/prefill/instantiate.cuh",
        "check(cudaMemsetAsync(workspace, 0, sizeof(int), stream), "
        '"cudaMemsetAsync(tile counter)");', "",
        LAUNCHES, "test_tiles_of_uneven_length_are_drawn_from_a_counter", "memset",
    ),
    "a tensor map with strides in elements": Fault(
        "cuda/sm90/prefill/tensor_map.cu",
        "{kElement, t.stride.s * kElement, t.stride.h * kElement, t.stride.b * kElement}",
        "{kElement, t.stride.s, t.stride.h, t.stride.b}",
        LAUNCHES, "test_attention[plain-H100-eager]", "strides",
    ),
    "a tensor map with the extents of another dim": Fault(
        "cuda/sm90/prefill/tensor_map.cu", "{t.dim, t.length, t.heads, t.batch}",
        "{t.dim, t.length, t.batch, t.heads}",
        LAUNCHES, "test_attention[plain-H100-eager]", "dims",
    ),
    "the driver's refusal of a tensor map is dropped": Fault(
        "cuda/sm90/prefill/tensor_map.cu", "if (status != CUDA_SUCCESS) {", "if (false) {",
        ERRORS, "test_a_failing_tensor_map_is_named", "DID NOT RAISE",
    ),
    "a head dim in the wrong class": Fault(
        "cuda/sm80/prefill/launch.cu", "dim <= 64 ? 64 :", "dim < 64 ? 64 :",
        LAUNCHES, "test_attention[plain-A100-eager]", "PrefillConfigILi64E",
    ),
    "softcap is left to the kernel without it": Fault(
        "cuda/sm80/prefill/launch.cu", "params.softcap != 0.0f ||", "",
        LAUNCHES, "test_attention[softcap-A100-eager]", "Lb1E",
    ),
    "dropout is not seen": Fault(
        "cuda/sm80/decode/launch.cu",
        'if (a.dropout_threshold != 0) return "dropout_p must be 0";', "",
        LAUNCHES, "test_dropout", "decode_kernel",
    ),
    "strides of 32 bits": Fault(
        "host/inputs.cpp", "return {x.stride(0), x.stride(1), x.stride(2)};",
        "return {static_cast<int>(x.stride(0)), static_cast<int>(x.stride(1)), x.stride(2)};",
        LAUNCHES, "test_offsets_beyond_32_bits[1-A100]", "k_stride.b",
    ),
    "K's strides for V": Fault(
        "host/inputs.cpp", "params.v_stride = strides_of(in.v);",
        "params.v_stride = strides_of(in.k);",
        LAUNCHES, "test_attention[everything-A100-eager]", "v_stride",
    ),
    "the launch waits for the device": Fault(
        "cuda/attention.cpp", "switch (phase) {\n    case Phase::kDecode: return sm80::decode(",
        'check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");\n  switch (phase) {\n'
        "    case Phase::kDecode: return sm80::decode(",
        LAUNCHES, "test_output_alone[A100-capture]", "not permitted when stream is capturing",
    ),
    "a stride of packed sequences that moves": Fault(
        "host/gradients.cpp", "if (packed) params.dk_stride.b = params.dv_stride.b = 0;", "",
        LAUNCHES, "test_backward_of_packed_sequences[plain-64]", "dk_stride.b",
    ),
}  # fmt: skip
# These reach every .cu file, so that all are compiled again: the launch code of all phases.
FAULTS |= {
    "no opt-in for shared memory": Fault(
        "cuda/launch.h", "if (shared_bytes > kAlwaysAllowed) {", "if (false) {",
        ERRORS, "test_attributes_are_set_on_every_device", "failed: invalid argument",
    ),
    "the error code of a launch is dropped": Fault(
        "cuda/launch.h",
        "check(cudaLaunchKernel(function, grid, dim3(block), arguments, shared_bytes, stream), "
        "name);",
        "cudaLaunchKernel(function, grid, dim3(block), arguments, shared_bytes, stream);",
        ERRORS, "test_a_failing_launch_is_named", "DID NOT RAISE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name):
    fault = FAULTS[name]
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
               os.path.join(folder, fault.file), "-k", fault.test.split("[")[0]]  # fmt: skip
    if "[" in fault.test:
        command[-3:] = [f"{command[-3]}::{fault.test}"]
    plant = json.dumps([[fault.path, fault.old, fault.new]])
    done = subprocess.run(
        command,
        cwd=compiled_units.ROOT,
        env={**os.environ, "GQA_TEST_PLANT": plant},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]
    assert fault.message in done.stdout, done.stdout[-6000:]
