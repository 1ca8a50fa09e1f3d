"""Quantised caches on the CUDA kernels, decode and prefill, executed by the emulator with its
checks on: bounds, races, uninitialised shared memory, copies not waited for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.cache.formats import FORMAT_OF_NAME, dequantize
from gqa_kernels.cache.view import KVView
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.decode import view_call
from gqa_kernels.testing import assert_cache_close
from tests.cases.caches import Kind, empty_cache, fill, hide_unused_pages
from tools.ptxsim import PtxError

from .compiled_units import unavailable_reason
from .cuda_cache import make_cache_call
from .cuda_harness import (
    Phase,
    Result,
    compiled,
)

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

UNEVEN = HeadMap([1, 0, 1, 1], num_kv_heads=3)  # interleaved, with an empty group
BF16, FP16 = torch.bfloat16, torch.float16
NAMES = {BF16: "bf16", FP16: "fp16"}
FORMATS = list(FORMAT_OF_NAME)
QUICK_NUMBERS = [
    *(("decode", FP16, format) for format in FORMATS),
    ("prefill", BF16, "fp8_e4m3"), ("prefill", BF16, "fp8_e5m2"), ("prefill", BF16, "int4"),
]  # fmt: skip
MANY_SMS = 24  # enough for the host code to split


def phase_for(name: str, inputs: AttentionCall) -> Phase:
    dim = max(inputs.head_dim, inputs.value_head_dim)
    dim_class = next(size for size in (64, 128, 256) if dim <= size)
    unit = f"quantized_d{dim_class}"
    if name == "prefill":
        unit = f"quantized_{NAMES[inputs.dtype]}_d{dim_class}"
    return compiled("sm80", name, "launch", unit)


def run(name: str, inputs: AttentionCall, num_sms: int = MANY_SMS, **options) -> Result:
    """A phase's results, checked."""
    result = phase_for(name, inputs).run(make_cache_call(inputs), num_sms, **options)
    assert_cache_close(result.out, inputs, result.lse)
    return result


def random_queries(batch: int, head_map: HeadMap, q_len: int, dim: int, dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, head_map.num_heads, q_len, dim, generator=generator).to(dtype)


def cache_inputs(
    kind: Kind, lengths=(140, 0, 5), q_len=1, dim=64, value_dim=None, dtype=BF16, head_map=UNEVEN,
    value_heads=None, **options,
) -> AttentionCall:  # fmt: skip
    """A cache with a history: NaN in unused slots and scales, garbage in unused page ids."""
    generator = torch.Generator().manual_seed(3)
    cache = empty_cache(
        kind, len(lengths), max(lengths), head_map, dim, value_dim or dim, dtype, "cpu", generator,
        value_heads,
    )  # fmt: skip
    fill(cache, list(lengths), generator, dtype=dtype)
    hide_unused_pages(cache)
    options = {
        key: value(cache.view().capacity) if callable(value) else value
        for key, value in options.items()
    }
    q = random_queries(len(lengths), head_map, q_len, dim, dtype)
    return view_call(q, cache.view(), head_map, **options)


EVERYTHING = {
    "window": (100, 2), "softcap": 3.0, "sinks": torch.tensor([1.0, -2.0, 0.0, 3.0]),
    "alibi_slopes": torch.linspace(0.0, 0.2, 4), "attn_mask": lambda n: torch.arange(n) % 5 > 0,
}  # fmt: skip
VALUE_MAP = {"value_heads": 2, "value_head_map": HeadMap([0, 0, 1, 0])}
CASES = {
    "fp8_e4m3": (Kind(format="fp8_e4m3"), {"lengths": (300, 0, 5), "dtype": FP16}),
    "fp8_e5m2-pages16": (Kind(16, format="fp8_e5m2"), {"q_len": 3, **EVERYTHING}),
    "int8-zeros-pages3": (
        Kind(3, "NHD", format="int8", zeros=True), {"dim": 40, "value_dim": 24},
    ),
    "int8-value-map-pages1": (Kind(1, "NHD", format="int8"), {"lengths": (70, 9), **VALUE_MAP}),
    "int4-pages64": (
        Kind(64, "NHD", begin=True, format="int4"), {"dtype": FP16, "q_len": 2, "value_dim": 32},
    ),
    "int4-zeros-unaligned": (
        Kind(batch_index=True, format="int4", zeros=True), {"dim": 38, "value_dim": 22},
    ),
}  # fmt: skip
SLOW_CASES = {
    **{
        f"{format}-{dim}-{NAMES[dtype]}": (
            Kind(16, format=format, zeros=format.startswith("int") and dtype == BF16),
            {"lengths": (270, 64), "dim": dim, "dtype": dtype, "q_len": 2},
        )
        for format in FORMATS
        for dim in (64, 128, 256)
        for dtype in (BF16, FP16)
    },
    "e4m3-unaligned": (Kind(3, "NHD", format="fp8_e4m3"), {"dim": 61, "value_dim": 15}),
    "int8-everything": (Kind(format="int8"), {"dim": 112, "dtype": FP16, **EVERYTHING}),
}  # fmt: skip


def case(name: str, **changes) -> AttentionCall:
    kind, options = {**CASES, **SLOW_CASES}[name]
    return cache_inputs(kind, **{**options, **changes})


@pytest.mark.parametrize("name", CASES)
def test_decode(name):
    inputs = case(name)
    result = run("decode", inputs)
    seen = inputs.kv.capacity
    if inputs.options.window_left >= 0:
        seen = min(seen, inputs.options.window_left + inputs.options.window_right + inputs.q_len)
    assert len(result.launches) == (2 if seen > 128 else 1)  # two blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_more_of_decode(name):
    run("decode", case(name))


@pytest.mark.slow
def test_group_larger_than_a_tile():
    head_map = HeadMap([0] * 19 + [1])
    run("decode", cache_inputs(Kind(16, format="int4"), (90,), head_map=head_map))


@pytest.mark.parametrize("name", [x for x in CASES if x != "fp8_e4m3"])
def test_prefill(name):
    """More queries than some sequence has keys; in bf16, for one build."""
    run("prefill", case(name, q_len=35, dtype=BF16))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_more_of_prefill(name):
    run("prefill", case(name, q_len=40))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_order_of_warps_does_not_matter(phase, seed):
    inputs = cache_inputs(Kind(16, format="int8", zeros=True), (290, 130), q_len=20)
    first, other = (run(phase, inputs, seed=s) for s in (0, seed))
    assert torch.equal(first.out, other.out) and torch.equal(first.lse, other.lse)


def view_of(
    k: torch.Tensor, v: torch.Tensor, k_scale=1.0, v_scale=1.0, k_zero=None, v_zero=None
) -> KVView:
    """A dense cache, full."""
    lengths = torch.full((k.shape[0],), k.shape[2], dtype=torch.int32)
    numbers = {"k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero}
    return KVView.create(k, v, lengths, **numbers)


@pytest.mark.parametrize(
    "phase, dtype, format",
    [
        pytest.param(*x, marks=[] if x in QUICK_NUMBERS else pytest.mark.slow)
        for x in product(("decode", "prefill"), (BF16, FP16), FORMATS)
    ],
)
def test_every_number(phase, dtype, format):
    """All 256 bytes: of V as they come out of a softmax of one key, of K as the scores of one-hot
    queries. Subnormals, infinities and NaN included."""
    storage = FORMAT_OF_NAME[format].storage
    stored = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 32 if format == "int4" else 64)
    v = stored.view(storage)
    values = dequantize(v, torch.ones(()), None)  # [sequences, 1, 1, 64]
    k = v if format == "int4" else stored.masked_fill(~values.isfinite(), 0).view(storage)
    q = torch.eye(64).view(1, 1, 64, 64).expand(len(v), -1, -1, -1)
    view = view_of(k, v)
    inputs = view_call(q.to(dtype), view, HeadMap([0]), scale=1.0, causal=False)
    result = phase_for(phase, inputs).run(make_cache_call(inputs))
    expected = values.to(dtype).expand_as(result.out)
    torch.testing.assert_close(result.out, expected, rtol=0, atol=0, equal_nan=True)
    scores = values.nan_to_num(0, 0, 0)[:, :, 0]
    torch.testing.assert_close(result.lse, scores, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=pytest.mark.slow)])
def test_scales_and_zeros_of_any_size(dtype):
    """Scales from token to token far apart, 0 among them; zeros that are no integers, one per head;
    queries far from 1."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, 3, 150, 64)
    k, v = (torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for _ in "kv")
    k_scale = torch.exp2(torch.randint(-14, -5, shape[:3], generator=generator).float())
    v_scale = torch.exp2(torch.randint(-30, 5, shape[:3], generator=generator).float())
    k_scale[0, 1, 7] = v_scale[0, 1, 9] = v_scale[1, 1, :20] = 0
    k_zero = torch.tensor([0.3, -90.7, 3.0])[:, None].expand(shape[:3]).contiguous()
    v_zero = torch.full(shape[:3], 5.25)
    view = view_of(k, v, k_scale, v_scale, k_zero, v_zero)
    q = random_queries(2, UNEVEN, 2, 64, dtype) * 4096
    inputs = view_call(q, view, UNEVEN, scale=0.125 / 4096, causal=False)
    run("decode", inputs)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_scales_of_heads_and_of_the_tensor(phase):
    """As engines keep fp8: one scale for each head of K, one for all of V."""
    generator = torch.Generator().manual_seed(6)
    k, v = (torch.randn(2, 3, 90, 64, generator=generator).to(torch.float8_e4m3fn) for _ in "kv")
    view = view_of(k, v, k_scale=torch.tensor([0.5, 2.0, 1.0]), v_scale=0.03)
    run(phase, view_call(random_queries(2, UNEVEN, 3, 64, BF16), view, UNEVEN))


def test_numbers_that_are_not_given():
    """The op takes None for scales: 1. A cache without zeros has the format's."""
    inputs = cache_inputs(Kind(16, format="int4"), (40, 7))
    ones = {name: torch.ones_like(getattr(inputs.kv, name)) for name in ("k_scale", "v_scale")}
    inputs = inputs.replace(kv=replace(inputs.kv, **ones), scale=0.01)
    for phase in ("decode", "prefill"):
        call = make_cache_call(inputs)
        call.params.k_scale = call.params.v_scale = None
        result = phase_for(phase, inputs).run(call)
        assert_cache_close(result.out, inputs, result.lse)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_page_outside_the_storage_poisons_the_rows_that_see_it(phase):
    """Integers have no NaN of their own. No read out of bounds, and other rows unchanged."""
    inputs = cache_inputs(Kind(16, format="int8"), (90, 50), q_len=4, window=(20, 0))
    table = inputs.kv.page_table.clone()
    table[0, :, 4] = -1  # keys 64 to 79: seen
    table[0, :, 2] = 1 << 20  # keys 32 to 47: not seen
    broken = inputs.replace(kv=replace(inputs.kv, page_table=table))
    good = run(phase, inputs)
    result = phase_for(phase, broken).run(make_cache_call(broken))
    assert result.out[0].isnan().all() and result.lse[0].isnan().all()
    assert torch.equal(result.out[1], good.out[1]) and torch.equal(result.lse[1], good.lse[1])


@pytest.mark.parametrize(
    "format, dim",
    [("int8", 64), ("int4", 64), pytest.param("fp8_e4m3", 128, marks=pytest.mark.slow)],
)
def test_stored_bytes_cross_memory_once_and_no_bank_conflicts(format, dim):
    """What a profiler would show: a group's bytes once, half or a quarter of what bf16 has; scales
    beside them; and nothing in the loop that has to be repeated."""
    head_map = HeadMap([0, 2, 0, 0, 2, 0, 0, 0], num_kv_heads=3)
    kv_len, used_heads = 768, 2
    inputs = cache_inputs(Kind(format=format), (kv_len,), dim=dim, head_map=head_map)
    result = run("decode", inputs, num_sms=2)
    (report, *_), (_, grid, _) = result.reports, result.launches[0]
    sites = [site for site in report.memory_sites if site["kind"] == "global"]
    rows = 2 * used_heads * kv_len
    stored_bytes = rows * dim * (4 if format == "int4" else 8) // 8
    copies = [site for site in sites if "cp.async.cg" in site["where"]]
    assert 32 * sum(site["sectors"] for site in copies) == stored_bytes
    numbers = [site for site in sites if "cp.async.ca" in site["where"]]
    assert 32 * sum(site["sectors"] for site in numbers) <= rows * 4 * 1.6
    reads = sum(site["sectors"] for site in sites if "st.global" not in site["where"])
    assert 32 * reads <= stored_bytes + rows * 4 * 1.6 + 32 * 200  # map, Q
    # But for Q, whose pairs are put in the order of K's, and for what a CTA stores once.
    shared = [site for site in report.memory_sites
              if site["kind"] == "shared" and site["requests"] > math.prod(grid)]  # fmt: skip
    assert sum(site["excess"] for site in shared if "st.shared.b32" not in site["where"]) == 0


BREAKS = {
    "a scale of the wrong key": (
        "dequantize.cuh", "(threadIdx.x & 3) * 8", "(threadIdx.x & 2) * 8",
    ),
    "one key too many": ("dequantize.cuh", "mine < limit", "mine <= limit"),
    "the maximum without the scales": (
        "online_softmax.cuh", "C::kQuantized ? x + numbers.log2_v_scale(e) : x", "x",
    ),
    "stages overlap": ("pipeline.cuh", "warp * C::kWarpBytes", "warp * 2 * C::kTileBytes"),
    "offsets not rescaled": (
        "online_softmax.cuh", "offset[0] *= alpha[0], offset[1] *= alpha[1];", "",
    ),
    "zeros of V forgotten": ("merge_warps.cuh", "- state.offset[h]) * factor", ") * factor"),
    "zeros of K forgotten": ("dequantize.cuh", "x = fmaf(-k_zero[e], sum[h], x)", "x = x"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_planted_errors_are_noticed(name):
    inputs = cache_inputs(Kind(format="int8", zeros=True), (330, 41), q_len=2)
    wide = torch.exp2(torch.arange(inputs.kv.v_scale.numel()) % 31 - 15.0)
    scale = inputs.kv.v_scale * wide.view_as(inputs.kv.v_scale)
    inputs = inputs.replace(kv=replace(inputs.kv, v_scale=scale))
    run("decode", inputs)
    phase = Phase("sm80", "decode", ("launch", "quantized_d64"), replace=(BREAKS[name],))
    with pytest.raises((AssertionError, PtxError)):
        result = phase.run(make_cache_call(inputs), MANY_SMS)
        assert_cache_close(result.out, inputs, result.lse)
