"""The append kernel's compiled PTX, launched by its own host code, in the emulator: what it stores
against the definition, bit for bit, in used and unused slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gqa_kernels import PagedKVCache
from gqa_kernels.backends.reference.cache import reference_append
from gqa_kernels.cache.formats import FORMAT_OF_NAME
from gqa_kernels.call.append import AppendCall
from tests.backends.test_cpu_cache import after, assert_same, random_append
from tests.cache.test_append import FORMATS, rotary_table
from tests.cases.appends import CASES, ROTARY, SHAPES, appends, assert_same_memory, bits
from tests.cases.caches import Kind
from tests.emulation.compiled_units import unavailable_reason
from tests.emulation.cuda_append import append_phase, emulated_append, make_append_call
from tests.emulation.cuda_harness import (
    Phase,
    Result,
)
from tools.ptxsim import PtxError

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(phase: Phase | None = None, change=lambda inputs: inputs, **options) -> Result:
    """Hold an append to the definition; ``change`` is made to the inputs of both."""
    expected, got = (change(appends(**options)) for _ in range(2))
    rotated = reference_append(expected)
    result = emulated_append(got, phase)
    assert_same_memory(got.kv, expected.kv)
    if got.rotary_cos is not None and got.q is not None:
        assert torch.equal(bits(result.out), bits(rotated)), "q"
    return result


@pytest.mark.parametrize("name", CASES)
def test_stores_what_the_definition_says(name):
    check(**CASES[name])


def test_positions_beyond_the_table_take_its_last_row():
    def shorter(inputs):
        return replace(
            inputs,
            rotary_cos=inputs.rotary_cos[:5].contiguous(),
            rotary_sin=inputs.rotary_sin[:5].contiguous(),
        )

    check(change=shorter, rotary_dim=16)


def test_lengths_and_pages_of_each_head():
    """A page of one head each; the tokens of a head go behind its own length."""

    def inputs():
        generator = torch.Generator().manual_seed(1)
        table = torch.randperm(12, generator=generator).view(2, 3, 2)
        k, v = (torch.full((12, 3, 16), torch.nan) for _ in range(2))
        lengths = torch.tensor([[0, 4, 1], [2, 1, 3]], dtype=torch.int32)
        new = torch.randn(2, 2, 3, 2, 16, generator=generator)
        view = PagedKVCache(k, v, table, lengths).view()
        cos, sin = rotary_table(8)
        return AppendCall.create(*new, view, rotary_cos=cos, rotary_sin=sin)

    expected, got = inputs(), inputs()
    reference_append(expected)
    emulated_append(got)
    assert_same_memory(got.kv, expected.kv)


@pytest.mark.parametrize("kind", [Kind(3), Kind(), Kind(4, format="int8", begin=True)], ids=str)
def test_what_the_host_cannot_see(kind):
    """Tokens beyond the table, at negative places and in pages out of range are dropped, and the
    emulator sees no access out of bounds; the others go where they belong."""

    def broken(inputs):
        view = inputs.kv
        lengths = view.kv_lengths.clone()
        lengths[0] = 2 * view.capacity
        lengths[1] = -(1 << 31)
        lengths[3] = view.capacity - (0 if view.kv_begin is None else int(view.kv_begin[3])) - 2
        changes = {"kv_lengths": lengths}
        if view.page_table is not None:
            table = view.page_table.clone()
            table[2] = torch.tensor([-1, view.num_pages, 2**31 - 1])[:, None]  # of three heads
            changes["page_table"] = table
        if view.kv_begin is not None:
            begin = view.kv_begin.clone()
            begin[4], begin[5] = 1 << 30, -(1 << 30)
            changes["kv_begin"] = begin
        return replace(inputs, kv=replace(view, **changes))

    options = {"kind": kind, "counts": (3,) * 6, "lengths": (0,) * 6, "packed": False}
    check(change=broken, **options)
    before, after = appends(**options), broken(appends(**options))
    emulated_append(after)
    changed = (bits(before.kv.k) != bits(after.kv.k)).flatten(2).any(-1).any(1)
    assert changed.any() and not changed.all()


def test_many_packed_sequences():
    """More than a CTA has threads, empty ones between them, and a CTA that spans several."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 3, (300,), generator=generator) * (torch.arange(300) % 5 > 1)
    check(counts=tuple(counts.tolist()), lengths=(1,) * 300, kind=Kind(2), surplus=3)


@pytest.mark.parametrize("offsets", [[0, -5, 9], [7, 2, 1], [1 << 30, 0, -(1 << 31)], [5, 5, 5]])
def test_offsets_that_do_not_ascend_write_nothing_out_of_bounds(offsets):
    """Such offsets have no meaning. Queries that belong to no sequence are copied."""
    inputs = appends(kind=Kind(3), counts=(3, 6), lengths=(0, 0), rotary_dim=16)
    result = emulated_append(replace(inputs, new_offsets=torch.tensor(offsets, dtype=torch.int32)))
    assert result.out.isfinite().all()


def test_numbers_that_are_not_finite():
    """A NaN or an infinity spoils its row's scale, and no other row."""

    def changed(inputs):
        inputs.k_new[:, :, 1, 3] = torch.nan
        inputs.v_new[:, :, 4] *= 1e-42  # scales underflow
        if inputs.kv.k.dtype == torch.uint8:  # elsewhere inf / inf has many forms
            inputs.k_new[:, :, 2, 5] = -torch.inf
            inputs.v_new[:, :, 2, 5] = torch.inf
        return inputs

    for kind in (Kind(4, format="fp8_e5m2"), Kind(4, format="int8", zeros=True),
                 Kind(4, format="int4")):  # fmt: skip
        check(change=changed, kind=kind, dtype=FP32)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_given_scales(storage):
    """One for the tensor, or one for each head: read, not written."""

    def inputs():
        dim = 8 if storage == torch.uint8 else 16
        k, v = (torch.zeros(4, 3, 2, dim).to(storage) for _ in range(2))
        new = torch.linspace(-2000, 2000, 2 * 3 * 3 * 16).view(2, 3, 3, 16)
        scales = {"k_scale": 0.25, "v_scale": torch.tensor([0.5, 0.25, 2.0])}
        if storage != torch.float8_e4m3fn:
            scales["k_zero"] = 3.0
        table, lengths = torch.tensor([[0, 2], [3, 1]]), torch.zeros(2, dtype=torch.int32)
        return AppendCall.create(new, new, PagedKVCache(k, v, table, lengths, **scales).view())

    expected, got = inputs(), inputs()
    reference_append(expected)
    emulated_append(got)
    assert_same_memory(got.kv, expected.kv)
    assert got.kv.v_scale[0, :, 0].tolist() == [0.5, 0.25, 2.0]


TRAFFIC = {
    "dense": ({"packed": False, "counts": (4, 4), "lengths": (0, 9)}, 2),
    "packed-pages": ({"kind": Kind(16, "NHD"), "counts": (5, 1, 2)}, 2),
    "fp8": ({"kind": Kind(16, format="fp8_e4m3"), "counts": (5, 1, 2)}, 1),
    "int4": ({"kind": Kind(16, format="int4", zeros=True), "counts": (5, 1, 2)}, 0.5),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_every_byte_once(name):
    """What a profiler would count: rows are read and written once, in full sectors of 32 bytes."""
    options, stored_size = TRAFFIC[name]
    result = check(dim=128, **options)
    (report,) = result.reports
    assert report.bank_conflicts == 0
    rows, numbers = 8 * 3, 8 * 3 * (128 + 64)  # heads of K as of V
    sites = [site for site in report.memory_sites if site["kind"] == "global"]
    stores = [site for site in sites if "st.global" in site["where"]]
    vectors = [site for site in sites if "ld.global.v4" in site["where"]]
    assert 32 * sum(site["sectors"] for site in vectors) == numbers * 2
    rows_stored = [site for site in stores if "f32" not in site["where"]]
    assert 32 * sum(site["sectors"] for site in rows_stored) == numbers * stored_size
    # A scale and a zero for each row; lengths, page-table entries and offsets for each row.
    others = sum(site["sectors"] for site in sites if site not in vectors + rows_stored)
    assert others <= 2 * rows * 8


def test_launches_follow_from_shapes_alone():
    """What CUDA graphs need: one launch, whatever lengths and tables hold."""
    seen = set()
    for lengths in ((0, 0, 0), (11, 3, 9)):
        result = check(lengths=lengths, kind=Kind(3), rotary_dim=16)
        assert len(result.launches) == 1
        seen.add(str(result.launches))
    assert len(seen) == 1


def test_host_code_says_what_it_cannot_run():
    phase, call = append_phase(), make_append_call(appends())
    for name, value, reason in [
        ("k_dtype", 0, "k and v must have the new tokens' dtype or a quantised one"),
        ("v_dtype", 6, "k and v must have the same dtype"),
        ("head_dim", 257, "D must be 1 to 256, got 257"),
        ("value_head_dim", 0, "Dv must be 1 to 256, got 0"),
        ("num_k_heads", 0, "Hk must be at least 1, got 0"),
        ("kv_len", 1 << 31, "Sk must be below 2^31, got 2147483648"),
        ("num_v_heads", 1 << 29, "the number of new rows must be below 2^31, got 4831838235"),
    ]:
        before = getattr(call.params.cache, name)
        assert phase.unsupported(call) == ""
        setattr(call.params.cache, name, value)
        assert phase.unsupported(call) == reason
        setattr(call.params.cache, name, before)


EVERY = [
    {"kind": kind, "dim": dim, "dtype": dtype, "rotary_dim": rotary_dim, "interleaved": turn,
     "skew": skew}
    for i, kind in enumerate([*FORMATS, Kind(1), Kind(3, begin=True)])
    for dim, rotary_dim in ((64, 64), (128, 96), (256, 40), (12, 12))
    for dtype, turn, skew in [((BF16, FP16, FP32)[(i + dim) % 3], (i + dim) % 5 < 2, dim % 3)]
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY, ids=lambda options: "-".join(map(str, options.values())))
def test_every_kind_at_every_size(options):
    check(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *FORMAT_OF_NAME])
def test_random_appends(name):
    """Views, shapes, tables, scales and numbers of all kinds, as the CPU's kernel is tried on."""

    def emulated(inputs):
        result = emulated_append(inputs)
        return None if inputs.q is None else result.out

    for seed in range(16):
        inputs = random_append(seed, (FP32, BF16, FP16)[seed % 3], name)
        assert_same(after(emulated, inputs), after(reference_append, inputs), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_other_schedules(seed):
    for options in (ROTARY["int4"], SHAPES["surplus"]):
        inputs, expected = appends(**options), appends(**options)
        emulated_append(inputs, seed=seed)
        reference_append(expected)
        assert_same_memory(inputs.kv, expected.kv)


BREAKS = {
    "the other direction": ("rotary.cuh", "first ? -sin[i] : sin[i]", "first ? sin[i] : -sin[i]"),
    "a fused product": (
        "rotary.cuh", "__fadd_rn(__fmul_rn(a, cos), __fmul_rn(b, sin))",
        "fmaf(a, cos, __fmul_rn(b, sin))",
    ),
    "not rounded to the tokens' type": (
        "rotary.cuh", "to_float(rounded_to<T>(__fadd_rn(__fmul_rn(a, cos), __fmul_rn(b, sin))))",
        "__fadd_rn(__fmul_rn(a, cos), __fmul_rn(b, sin))",
    ),
    "half a row's range": ("kernel.cuh", "distance = lanes / 2", "distance = lanes / 4"),
    "the NaN of another row": ("kernel.cuh", "range.nan) & row) != 0", "range.nan)) != 0"),
    "the page of another head": ("kernel.cuh", "+ k_head * cache.page_table_stride_h", ""),
    "pages unchecked": ("kernel.cuh", "page >= 0 && page < cache.num_pages", "true"),
    "one slot too many": ("kernel.cuh", "slot >= cache.kv_len", "slot > cache.kv_len"),
    "one sequence too few": ("kernel.cuh", "offsets[ended + 1] <= token", "offsets[ended + 1] < 0"),
    "queries by their own head's length": (
        "kernel.cuh", "paired ? head : 0", "min(head, k_heads - 1)",
    ),
    "every row a vector": ("append.cu", "extent <= 1 ||", "true ||"),
    "truncated, not rounded": (
        "kernel.cuh", "quantize<S>(x[i], row)", "quantize<S>(x[i], row) - 0.4f",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_planted_errors_are_noticed(name):
    """A kernel broken in one place fails: by another result, or by one of the emulator's checks."""
    phase = Phase("sm80", "append", replace=(BREAKS[name],))

    def per_head(inputs):
        view = inputs.kv
        lengths = view.kv_lengths + torch.tensor([0, 3, 1], dtype=torch.int32)
        table = view.page_table.clone()
        table[:, 1] = table[:, 1].flip(1)
        table[0, 2, 1:] = view.num_pages
        return replace(inputs, kv=replace(view, kv_lengths=lengths, page_table=table))

    def nan(inputs):
        inputs.k_new[:, :, 1, 3] = torch.nan
        lengths = inputs.kv.kv_lengths.clone()
        lengths[0] = inputs.kv.capacity - 1
        return replace(inputs, kv=replace(inputs.kv, kv_lengths=lengths))

    with pytest.raises((AssertionError, PtxError)):
        for options in (ROTARY["half-split"], ROTARY["int4"], ROTARY["fp32"], {"dim": 59}):
            check(phase, **options)
        check(phase, per_head, kind=Kind(3), rotary_dim=16)
        check(phase, nan, kind=Kind(format="int8", zeros=True), dtype=FP32)
