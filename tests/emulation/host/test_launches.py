"""Every launch of every op: kernel, grid, shared memory, stream, workspace and arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.cuda import CUDABackend
from gqa_kernels.testing import make_inputs
from tests.cases import appends, attention, caches
from tests.emulation.cuda_backward import Packed, make_packed_call
from tests.emulation.test_cuda_keep import keep_of
from tests.emulation.test_cuda_quantized import cache_inputs

from . import checks
from .library import A100, B200, H100, RTX_5090

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = {"A100": A100, "H100": H100, "B200": B200, "RTX 5090": RTX_5090}
CAPTURES = pytest.mark.parametrize("capture", [False, True], ids=["eager", "capture"])
UNEVEN = HeadMap([1, 0, 1, 1], num_kv_heads=3)


def with_options_of_cuda(cases: list[attention.Case]) -> list[attention.Case]:
    """Those whose options the CUDA kernels have."""
    return [case for case in cases if case.needs() <= CUDABackend.capabilities.options]


CACHES = [kind for kind in caches.KINDS if kind.caches <= CUDABackend.capabilities.caches]


def sizes_of(case: attention.Case) -> list[attention.Case]:
    """The case in every head-dim class, and with enough tokens for prefill on any device."""
    if "dims" in case.id:
        return [case, replace(case, q_len=150, batch=8)]
    return [
        replace(case, head_dim=dim, value_head_dim=dim, **larger)
        for larger in ({}, {"q_len": 150, "batch": 8})
        for dim in (64, 128, 256)
    ]


@CAPTURES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", with_options_of_cuda(attention.CASES), ids=lambda case: case.id)
def test_attention(host, case, device, capture):
    """Options, maps and shapes of the test matrix."""
    for i, each in enumerate(sizes_of(case)):
        dtype = (BF16, FP16)[(i + capture) % 2]
        args, options = each.build(dtype, "cpu", "bshd" if len(case.id) % 2 else "bhsd")
        inputs = attention_call(*args, **options)
        checks.check_forward(host, inputs, DEVICES[device], capture=capture)


@CAPTURES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CACHES, ids=str)
def test_attention_over_caches(host, kind, device, capture):
    """Pages, left padding and formats, in every head-dim class, decode and prefill."""
    for dtype in (BF16, FP16):
        for dim in (64, 96, 256):
            for q_len, lengths in ((1, (140, 0, 5)), (300, (400, 310, 300, 301))):
                inputs = cache_inputs(kind, lengths, q_len, dim, dtype=dtype, window=(200, 3))
                checks.check_forward(host, inputs, DEVICES[device], capture=capture)


@CAPTURES
@pytest.mark.parametrize("device", DEVICES)
def test_output_alone(host, device, capture):
    """The op without an LSE launches what the other one does."""
    q, k, v = make_inputs(2, UNEVEN, 200, 200, 128, dtype=BF16)
    inputs = attention_call(q, k, v, UNEVEN, causal=True)
    with host.recording(DEVICES[device], capture=capture) as record:
        host.output(inputs)
    with host.recording(DEVICES[device], capture=capture) as same:
        host.forward(inputs)
    assert [(x.name, x.grid) for x in record.launches] == [(x.name, x.grid) for x in same.launches]


@CAPTURES
def test_tiles_of_uneven_length_are_drawn_from_a_counter(host, capture):
    """More tiles than multiprocessors: the counter is in the workspace, and starts at 0."""
    for head_dim in (64, 128, 256):
        q, k, v = make_inputs(8, UNEVEN, 1000, 1000, head_dim, dtype=BF16)
        for options in ({"causal": True}, {"window": (50, 50)}, {}):
            inputs = attention_call(q, k, v, UNEVEN, **options)
            record = checks.check_forward(host, inputs, H100, capture=capture)
            assert len(record.of("memset")) == (1 if options else 0)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "case", with_options_of_cuda(attention.PREFILL_CASES), ids=lambda case: case.id
)
def test_backward(host, case, dtype):
    """Options, maps and shapes of the test matrix, with a gradient of the LSE and without."""
    cases = [case] if "dims" in case.id else [
        replace(case, head_dim=dim, value_head_dim=dim) for dim in (64, 128, 256)
    ]  # fmt: skip
    for i, each in enumerate(cases):
        args, options = each.build(dtype, "cpu", "bshd" if len(case.id) % 2 else "bhsd")
        call, given = checks.backward_inputs(attention_call(*args, **options), use_lse=i == 0)
        checks.check_backward(host, call, given, H100 if i else A100, capture=i == 1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "slopes-and-sinks"])
def test_backward_of_packed_sequences(host, head_dim, biased):
    call, given = packed_backward(head_dim, biased)
    for capture in (False, True):
        checks.check_backward(host, call, given, H100, capture=capture)


APPENDS = {
    **{str(kind): {"kind": kind} for kind in appends.FORMATS},
    "fp32": {"dtype": FP32}, "fp16": {"dtype": FP16}, "not-packed": {"packed": False,
    "counts": (3, 3, 3)}, "unaligned": {"dim": 59, "skew": 1}, "rotary": {"rotary_dim": 16},
    "rotary-interleaved": {"rotary_dim": 16, "interleaved": True, "table_dtype": BF16},
    "value-heads": {"value_heads": 2}, "surplus": {"surplus": 4},
    **{f"dim-{dim}": {"dim": dim, "rotary_dim": 4} for dim in (12, 64, 128, 256)},
}  # fmt: skip


@CAPTURES
@pytest.mark.parametrize("options", APPENDS.values(), ids=list(APPENDS))
def test_append(host, options, capture):
    for device in DEVICES.values():
        checks.check_append(host, appends.appends(**options), device, capture=capture)


@CAPTURES
@pytest.mark.parametrize("kind", CACHES, ids=str)
def test_keep(host, kind, capture):
    sizes = ((64, 128), (12, 4), (58, 34), (200, 256))
    for device, dims in zip(DEVICES.values(), sizes, strict=True):
        dtype = FP32 if kind.format else BF16
        checks.check_keep(host, keep_of(kind, dtype, *dims), device, capture=capture)


@pytest.mark.parametrize("device", DEVICES)
def test_calls_of_nothing_launch_nothing(host, device):
    """Without sequences, queries or query heads there is nothing to write."""
    for batch, q_len in ((0, 5), (2, 0), (0, 300)):
        q, k, v = make_inputs(batch, UNEVEN, q_len, 20, 64, dtype=BF16)
        record = checks.check_forward(host, attention_call(q, k, v, UNEVEN), DEVICES[device])
        assert not record.launches and not record.of("memset")
    inputs = appends.appends(packed=False, counts=(0, 0, 0))
    assert not checks.check_append(host, inputs, DEVICES[device]).launches
    inputs = keep_of(caches.Kind(), BF16, 16, 16)
    nothing = replace(inputs, indices=inputs.indices[..., :0])
    assert not checks.check_keep(host, nothing, DEVICES[device]).launches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [3, 300])
def test_calls_without_keys_have_null_tensors(host, device, q_len):
    """K and V are empty, and their addresses null: outputs are written, no descriptor is made."""
    q, k, v = make_inputs(2, UNEVEN, q_len, 0, 64, dtype=BF16)
    assert k.data_ptr() == v.data_ptr() == 0
    record = checks.check_forward(host, attention_call(q, k, v, UNEVEN), DEVICES[device])
    assert len(record.launches) == 1
    assert len(record.of("encode")) in (0, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q_len", [1, 300])
def test_offsets_beyond_32_bits(host, device, q_len, tmp_path):
    """Strides and addresses in a file of 10 GiB without content arrive in full."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    memory = torch.from_file(str(path), shared=True, size=5 << 30, dtype=BF16)
    heads, tokens, dim = 3, 600, 64
    k = memory.as_strided((2, heads, tokens, dim), (1 << 31, 1 << 29, 1 << 14, 1))
    v = memory.as_strided(k.shape, k.stride(), 1 << 13)
    q = torch.zeros(2, 4, q_len, dim, dtype=BF16)
    assert k.stride(0) > torch.iinfo(torch.int32).max
    record = checks.check_forward(host, attention_call(q, k, v, UNEVEN), DEVICES[device])
    found = checks.argument_of(record.launches[0]).call
    assert (found.k_stride.b, found.v - found.k) == (1 << 31, 1 << 14)


def test_grids_stay_within_limits(host):
    """More tiles than a grid has in y or z, which the fake refuses as a device does."""
    many = HeadMap([0] * 4, num_kv_heads=1)
    q = torch.zeros(20_000, 4, 1, 8, dtype=BF16)
    k = torch.zeros(1, 1, 2, 8, dtype=BF16).expand(20_000, -1, -1, -1)
    checks.check_forward(host, attention_call(q, k, k, many), A100)
    q = torch.zeros(1, 4, 3_000_000, 8, dtype=BF16)
    record = checks.check_forward(host, attention_call(q, k[:1], k[:1], many), A100)
    assert record.launches[0].grid[0] > 65_535
    inputs = appends.appends(dim=256)
    k, v = (x[:, :, :1].expand(-1, -1, 50_000, -1) for x in (inputs.k_new, inputs.v_new))
    inputs = replace(inputs, k_new=k, v_new=v)  # most tokens are no sequence's
    assert checks.check_append(host, inputs, A100).launches[0].grid[0] > 65_535


def packed_backward(head_dim: int, biased: bool):
    """A backward of packed sequences: what the host code must make of it, the op's arguments."""
    q, k, v = make_inputs(1, UNEVEN, 90, 120, head_dim, dtype=BF16)
    options = {}
    if biased:
        options = {"alibi_slopes": torch.rand(3, 4), "sinks": torch.rand(4)}
    inputs = attention_call(q, k, v, UNEVEN, causal=True)
    inputs = inputs.replace(**options)
    packed = Packed(inputs, [0, 30, 30, 80], [0, 50, 60, 110])
    call = make_packed_call(packed)
    tensors, params = call.tensors, call.params
    checks.fill_in_packed(params.call, inputs)
    params.max_kv_len = 120
    params.call.q_len = 90
    given = {
        name: tensors.get(name)
        for name in ("dout", "dlse", "out", "lse", "kv_lengths", "kv_begin", "q_offsets", "sinks",
                     "alibi_slopes")
    }  # fmt: skip
    given |= {
        "q": inputs.q, "k": inputs.k, "v": inputs.v, "head_map": inputs.head_map_tensor,
        "max_q_len": 90, "max_kv_len": 120, "scale": inputs.scale,
        "window_left": inputs.options.window_left, "window_right": inputs.options.window_right,
        "need_slopes": biased, "need_sinks": biased,
    }  # fmt: skip
    return call, given


@CAPTURES
@pytest.mark.parametrize("q_len", [1, 150])
def test_dropout(host, q_len, capture):
    """Calls with dropout are prefill's, however few their queries, and Hopper's kernel has none."""
    q, k, v = make_inputs(8, UNEVEN, q_len, 170, 64, dtype=BF16)
    for seed in (1, 2):
        torch.manual_seed(seed)
        inputs = attention_call(q, k, v, UNEVEN, dropout_p=0.3).draw_dropout_seed()
        for device in DEVICES.values():
            checks.check_forward(host, inputs, device, capture=capture)
        call, given = checks.backward_inputs(inputs, use_lse=True)
        checks.check_backward(host, call, given, H100, capture=capture)
