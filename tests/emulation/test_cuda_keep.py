"""The keep kernel's compiled PTX, launched by its own host code, in the emulator: what it leaves
against the definition, bit for bit, in used and unused slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gqa_kernels.backends.reference.cache import gather, reference_append, reference_keep
from gqa_kernels.call.append import AppendCall
from gqa_kernels.call.keep import KeepCall
from tests.cache.test_append import stored
from tests.cases.attention import UNEVEN
from tests.cases.caches import KINDS, Kind, empty_cache
from tests.cases.kept import random_kept
from tests.emulation.compiled_units import unavailable_reason
from tests.emulation.cuda_append import emulated_append
from tests.emulation.cuda_harness import Phase
from tests.emulation.cuda_keep import emulated_keep, keep_phase, make_keep_call
from tools.ptxsim import PtxError

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DENSE = Kind()
LENGTHS = (37, 0, 290)  # the last takes several steps of the kernel


def filled(kind: Kind, lengths, dtype, dim, value_dim, value_heads=None):
    """A cache with random tokens; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    if kind.order == "packed":
        value_dim = dim
    cache = empty_cache(
        kind, len(lengths), max(lengths), UNEVEN, dim, value_dim, dtype, "cpu", generator,
        value_heads,
    )  # fmt: skip
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    heads = UNEVEN.num_kv_heads
    k = torch.randn(sum(lengths), heads, dim, generator=generator).to(dtype)
    v = torch.randn(sum(lengths), value_heads or heads, value_dim, generator=generator).to(dtype)
    cache.append(k, v, cu_seqlens=offsets, backend="reference")
    return cache


def keep_of(kind: Kind, dtype: torch.dtype, dim: int, value_dim: int) -> KeepCall:
    """A keep of random keys."""
    generator = torch.Generator().manual_seed(7)
    kept, counts = random_kept([5, 0, 20], UNEVEN.num_kv_heads, generator)
    return KeepCall.create(filled(kind, (5, 0, 20), dtype, dim, value_dim).view(), kept, counts)[0]


def check(
    kind: Kind = DENSE, lengths=LENGTHS, dtype=BF16, dim: int = 64, value_dim: int = 64,
    value_heads: int | None = None, phase: Phase | None = None, change=lambda call: call, **options,
):  # fmt: skip
    """Hold a keep to the definition; ``change`` is made to both calls."""
    generator = torch.Generator().manual_seed(7)
    kept, counts = random_kept(list(lengths), UNEVEN.num_kv_heads, generator)
    if value_heads is not None:
        kept, counts = kept[:, 0], counts[:, 0]
    caches = [filled(kind, lengths, dtype, dim, value_dim, value_heads) for _ in range(2)]
    calls = [change(KeepCall.create(cache.view(), kept, counts)[0]) for cache in caches]
    reference_keep(calls[0])
    result = emulated_keep(calls[1], phase, **options)
    for got, expected in zip(stored(caches[1]), stored(caches[0]), strict=True):
        assert torch.equal(got, expected)
    return result


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_moves_what_the_definition_moves(kind):
    check(kind, dtype=FP32 if kind.format else BF16)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("format", [None, "fp8_e4m3", "int8", "int4"])
def test_pages_of_any_size(page_size, format):
    check(Kind(page_size, "NHD", format=format), dtype=FP16)


@pytest.mark.parametrize(
    "dims", [(12, 4), (59, 33), (256, 200), (16, 576)], ids=lambda dims: f"{dims[0]}-{dims[1]}"
)
def test_rows_of_any_width(dims):
    """Those that are not made of 16-byte pieces move byte by byte."""
    result = check(dtype=BF16, dim=dims[0], value_dim=dims[1], lengths=(50, 9))
    in_bytes = any(dim % 8 for dim in dims)
    ((kernel, grid, _),) = result.launches
    assert ("<uint4>" in kernel) != in_bytes
    assert grid[:2] == (2 * 2 * UNEVEN.num_kv_heads, -(-max(dims) * 2 // 64))


def test_other_numbers_of_value_heads():
    check(Kind(16, "NHD", format="int8"), value_heads=2)


@pytest.mark.parametrize("seed", range(3))
def test_other_schedules(seed):
    check(lengths=(300,), seed=seed)


@pytest.mark.parametrize(
    "kind",
    [Kind(), Kind(begin=True), Kind(1), Kind(3, "NHD", format="int8"), Kind(16, format="int4"),
     Kind(16, format="int8", zeros=True), Kind(64, "NHD", format="fp8_e4m3")],
    ids=str,
)  # fmt: skip
def test_histories_of_appends_and_keeps(kind):
    """Each head with a length of its own after the first keep; the memory is compared after every
    step, so attention over it reads the kept keys."""
    generator = torch.Generator().manual_seed(5)
    dtype, capacity, heads = FP16 if kind.format else BF16, 60, UNEVEN.num_kv_heads
    caches = [
        empty_cache(kind, 3, capacity, UNEVEN, 32, 32, dtype, "cpu",
                    torch.Generator().manual_seed(3)) for _ in range(2)
    ]  # fmt: skip
    for step in range(12):
        lengths = caches[0].lengths
        count = int(torch.randint(1, 12, (), generator=generator))
        if step % 3 != 2 and int(lengths.max()) + count <= capacity:
            k, v = torch.randn(2, 3, heads, count, 32, generator=generator).to(dtype)
            for cache, append in zip(caches, (reference_append, emulated_append), strict=True):
                append(AppendCall.create(k, v, cache.view()))
                cache.lengths = cache.lengths + count
        else:
            mask = torch.rand(3, heads, int(lengths.max()), generator=generator) < 0.7
            of_heads = lengths if lengths.dim() == 2 else lengths[:, None]
            mask &= torch.arange(mask.shape[2]) < of_heads[..., None]
            for cache, keep in zip(caches, (reference_keep, emulated_keep), strict=True):
                call, cache.lengths = KeepCall.create(cache.view(), mask)
                keep(call)
        for got, expected in zip(stored(caches[1]), stored(caches[0]), strict=True):
            assert torch.equal(got, expected), step
    assert caches[0].lengths.unique().numel() > 3


@pytest.mark.parametrize("kind", [Kind(), Kind(3), Kind(4, format="int8", begin=True)], ids=str)
def test_what_the_host_cannot_see(kind):
    """Indices, counts, lengths and pages out of range move nothing, and the emulator sees no access
    out of bounds."""
    cache = filled(kind, (20, 20, 20, 20), BF16, 64, 64)
    heads = UNEVEN.num_kv_heads
    indices = torch.arange(3, 19, dtype=torch.int32).expand(4, heads, -1).clone()
    counts = torch.full((4, heads), 16, dtype=torch.int32)
    indices[0, :, ::2] = torch.tensor([-1, -(1 << 31), (1 << 31) - 1, 500] * 2)
    counts[1] = 1 << 30
    counts[2] = -5
    view = cache.view()
    changes = {"kv_lengths": view.kv_lengths.clone()}
    changes["kv_lengths"][3] = 1 << 30
    if view.page_table is not None:
        table = view.page_table.clone()
        table[3, :, :2] = torch.tensor([-1, view.num_pages])
        changes["page_table"] = table
    before = gather(view)[:2]
    emulated_keep(KeepCall(replace(view, **changes), indices, counts))
    for old, new in zip(before, gather(view)[:2], strict=True):
        expected = old.clone()
        expected[0, :, 1:16:2] = old[0, :, 4:19:2]  # the others are out of range
        expected[1, :, :16] = old[1, :, 3:19]  # no more than there are indices
        if view.page_table is None:
            expected[3, :, :16] = old[3, :, 3:19]
        else:  # no key moves from or to its first two pages
            begin = 0 if view.kv_begin is None else int(view.kv_begin[3])
            first = max(2 * view.page_size - begin, 0)
            expected[3, :, first:16] = old[3, :, first + 3 : 19]
        assert torch.equal(new, expected)
    emulated_keep(KeepCall(view, indices[:, :, :0], counts))


def all_but_the_first(call: KeepCall) -> KeepCall:
    """Each row becomes the one before it: every row is read and overwritten in one step."""
    lengths = call.kv.kv_lengths.expand(call.counts.shape)
    indices = torch.arange(1, int(lengths.max()), dtype=torch.int32)
    return KeepCall(call.kv, indices.expand(*call.counts.shape, -1), (lengths - 1).clamp(min=0))


@pytest.mark.parametrize("value_dim", [64, 60], ids=["pieces", "bytes"])
def test_a_missing_barrier_is_noticed(value_dim):
    """A step then overwrites rows that other warps have not read yet."""
    options = {"lengths": (300,), "value_dim": value_dim, "change": all_but_the_first}
    check(**options)
    phase = Phase("sm80", "keep", replace=(("kernel.cuh", "__syncthreads();", ""),))
    with pytest.raises(AssertionError):
        for seed in range(5):
            check(phase=phase, seed=seed, **options)


def one_key_too_many(call: KeepCall) -> KeepCall:
    """Each head that keeps a key also asks for the first one behind its length."""
    indices, counts = call.indices.clone(), call.counts.clone()
    lengths = call.kv.kv_lengths.expand(counts.shape)
    for b, h in (counts > 0).nonzero().tolist():
        last = min(int(counts[b, h]), int(lengths[b, h]) - 1)
        indices[b, h, last], counts[b, h] = lengths[b, h], last + 1
    return KeepCall(call.kv, indices, counts)


ZEROS = Kind(16, format="int8", zeros=True)


@pytest.mark.parametrize(
    "old, new, options",
    [
        ("key >= length", "key > length", {"kind": ZEROS, "change": one_key_too_many}),
        ("first += kLanes * kKeepRows", "first += 2 * kLanes * kKeepRows", {"kind": ZEROS}),
        ("if (moves_zero) {", "if (false) {", {"kind": ZEROS}),
        ("if (moves_scale) {", "if (false) {", {"kind": ZEROS}),
    ],
    ids=["length", "step", "zeros", "scales"],
)
def test_other_faults_are_noticed(old, new, options):
    check(**options)
    with pytest.raises((AssertionError, PtxError)):
        check(phase=Phase("sm80", "keep", replace=(("kernel.cuh", old, new),)), **options)


def test_refusals():
    call = make_keep_call(KeepCall.create(filled(Kind(), (3,), BF16, 8, 8).view(),
                                          torch.zeros(1, 0, dtype=torch.int32))[0])  # fmt: skip
    call.params.cache.num_k_heads = 0
    assert keep_phase().unsupported(call) == "Hk must be at least 1, got 0"
    call.params.cache.num_k_heads, call.params.cache.kv_len = 1, 1 << 31
    assert keep_phase().unsupported(call) == "Sk must be below 2^31, got 2147483648"
