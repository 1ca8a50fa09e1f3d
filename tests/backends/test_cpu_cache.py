"""Caches in the native CPU kernels: loaders and appends on every instruction set, as raw ops."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.cpu import CPUBackend
from gqa_kernels.backends.reference.cache import reference_append
from gqa_kernels.cache.formats import FORMAT_OF_NAME, quantize, row_scales
from gqa_kernels.cache.view import KVView
from gqa_kernels.call.append import AppendCall
from gqa_kernels.decode import view_call
from gqa_kernels.native import build
from gqa_kernels.native.schema import APPEND, FORWARD
from gqa_kernels.testing import assert_cache_close
from tests.backends.test_cpu import isa  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None, reason="no compiled kernels and no compiler"
)
CPU = CPUBackend()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [None, *FORMAT_OF_NAME]
QUANTISED = list(FORMAT_OF_NAME)


@pytest.fixture(autouse=True)
def loaded():
    build.load()


def stored_rows(x, dtype, name, zeros=False):
    """Storage of rows ``[P, H, page_size, D]``, its scale and its zero."""
    if name is None:
        return x.to(dtype), None, None
    scale, zero = row_scales(x, FORMAT_OF_NAME[name], zeros)
    return quantize(x, FORMAT_OF_NAME[name], scale, zero), scale, zero


def lengths_before(rnd, begin, batch, heads, capacity):
    """Any lengths that fit, of each head."""
    room = [capacity - (int(begin[b]) if begin is not None else 0) for b in range(batch)]
    return torch.tensor([[rnd.randint(0, n) for _ in range(heads)] for n in room]).int()


def random_view(rnd, generator, dtype, name, value_heads=None):
    """Pages of any size in random order, shared or of each head, with or without padding."""
    batch, heads, pages = rnd.randint(1, 3), rnd.randint(1, 3), rnd.randint(1, 6)
    page_size = rnd.choice([1, 3, 16, 64])
    dim, value_dim = rnd.choice([2, 16, 30, 64, 128, 576]), rnd.choice([16, 18, 40, 512])
    total = batch * pages * heads + 3
    headwise = rnd.random() < 0.5
    table = torch.randperm(total, generator=generator)[: batch * pages * (heads if headwise else 1)]
    begin = None
    if rnd.random() < 0.4:
        begin = torch.tensor([rnd.randint(0, page_size * pages) for _ in range(batch)]).int()
    lengths = lengths_before(rnd, begin, batch, heads, page_size * pages)
    zeros = name in ("int8", "int4") and rnd.random() < 0.5
    k, k_scale, k_zero = stored_rows(
        torch.randn(total, heads, page_size, dim, generator=generator), dtype, name, zeros
    )
    v, v_scale, v_zero = stored_rows(
        torch.randn(total, heads, page_size, value_dim, generator=generator), dtype, name, zeros
    )
    return KVView.create(
        k, v, lengths if headwise else lengths[:, 0].contiguous(),
        page_table=table.view(batch, -1, pages).int(), kv_begin=begin,
        k_scale=k_scale, v_scale=v_scale, k_zero=k_zero, v_zero=v_zero,
    )  # fmt: skip


def random_call(seed, dtype, name):
    rnd, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    view = random_view(rnd, generator, dtype, name)
    heads, offsets = rnd.randint(1, 9), None
    if rnd.random() < 0.4:
        counts = [rnd.choice([0, 1, 2, 7, 25]) for _ in range(view.batch)]
        offsets = torch.tensor([0, *itertools.accumulate(counts)]).int()
        shape = (sum(counts), heads, view.head_dim)
    else:
        shape = (view.batch, heads, rnd.choice([1, 1, 3, 20]), view.head_dim)
    return view_call(
        torch.randn(shape, generator=generator).to(dtype),
        view,
        HeadMap([rnd.randrange(view.num_k_heads) for _ in range(heads)], view.num_k_heads),
        cu_seqlens_q=offsets,
        window=(rnd.choice([None, 5]), rnd.choice([None, 0, 3])),
        softcap=rnd.choice([None, None, 2.0]),
        sinks=torch.rand(heads) if rnd.random() < 0.2 else None,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_instruction_set_on_random_views(isa, name):  # noqa: F811
    for seed in range(24):
        inputs = random_call(seed, DTYPES[seed % 3], name)
        out, lse = CPU.attend(inputs)
        alone, _ = CPU.attend(inputs.replace(lse_wanted=False))
        try:
            assert_cache_close(out, inputs, lse)
            assert_cache_close(alone, inputs)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def decode_of(q, k, v, name, zeros=False):
    """Out of a decode step over dense int8 or int4, which reads no LSE; and the call."""
    (k, ks, kz), (v, vs, vz) = (stored_rows(x, q.dtype, name, zeros) for x in (k, v))
    lengths = torch.full((q.shape[0],), k.shape[2]).int()
    view = KVView.create(k, v, lengths, k_scale=ks, v_scale=vs, k_zero=kz, v_zero=vz)
    inputs = view_call(q, view, HeadMap([0, 0, 1, 0, 1])).replace(lse_wanted=False)
    return CPU.attend(inputs)[0], inputs


@pytest.mark.parametrize("name, zeros", [("int8", False), ("int8", True), ("int4", True)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_products_of_int16(isa, name, zeros, dtype):  # noqa: F811
    """Queries with outlier channels, as models have them, leave few of the 16 bits to the other
    channels; sharp and flat distributions over many keys."""
    for seed, sharpness in enumerate((0.1, 1.0, 4.0)):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(2, 5, 1, 96, generator=generator) * sharpness
        k, v = (torch.randn(2, 2, 700, 96, generator=generator) for _ in range(2))
        q[..., 3] *= 40
        k[..., 3] *= 0.1
        assert_cache_close(*decode_of(q.to(dtype), k, v, name, zeros))


def test_the_largest_sums_of_int16(isa):  # noqa: F811
    """The largest numbers of q and K everywhere, over the widest head."""
    q = torch.ones(1, 5, 1, 576, dtype=torch.bfloat16)
    k = torch.ones(1, 2, 40, 576) * torch.where(torch.arange(40) % 3 == 0, -1, 1)[:, None]
    v = torch.randn(1, 2, 40, 576, generator=torch.Generator().manual_seed(0))
    assert_cache_close(*decode_of(q, k, v, "int8"))


def test_numbers_that_int16_lacks(isa):  # noqa: F811
    """NaN and infinities of queries and scales show; rows of zeros, and numbers whose step would be
    none, stay finite."""
    k, v = (torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(0)) for _ in "kv")
    q = torch.ones(2, 5, 1, 32, dtype=torch.bfloat16)
    for bad in (float("nan"), float("inf")):
        wrong = q.clone()
        wrong[0, 2, 0, 9] = bad
        out, _ = decode_of(wrong, k, v, "int8")
        rows = torch.zeros(2, 5, dtype=torch.bool)
        rows[0, 2] = True
        assert torch.equal(out.isnan().all(-1)[..., 0], rows)
        assert torch.equal(out.isnan().any(-1)[..., 0], rows)
    for tiny in (0.0, 1e-38, 1e-30):
        assert_cache_close(*decode_of(q * tiny, k, v, "int8"))
    out, inputs = decode_of(q, k, v, "int8")
    inputs.kv.v_scale[1, 0, 5] = float("nan")
    out, _ = CPU.attend(inputs)
    heads = torch.tensor([True, True, False, True, False])  # those of KV head 0
    assert torch.equal(out[1, :, 0].isnan().all(-1), heads) and not out[0].isnan().any()


def paged_call(dtype, name=None, q_len=1, length=300, page_size=16, dim=64):
    """2 sequences, 2 heads; and the same keys as one dense page each."""
    generator = torch.Generator().manual_seed(1)
    pages = -(-length // page_size)
    x = [torch.randn(2, 2, pages * page_size, dim, generator=generator) for _ in "kv"]
    (k, ks, _), (v, vs, _) = (stored_rows(side, dtype, name) for side in x)
    table = torch.randperm(2 * pages, generator=generator).int()
    place = table.long()

    def paged(rows):
        if rows is None:
            return None
        cut = rows.view(2, 2, pages, page_size, *rows.shape[3:]).transpose(1, 2).flatten(0, 1)
        memory = cut.view(torch.uint8) if cut.element_size() == 1 else cut
        memory = torch.empty_like(memory).index_copy_(0, place, memory)
        return memory.view(rows.dtype)

    lengths = torch.tensor([[length, length // 3], [length - 1, 0]]).int()
    dense = KVView.create(k, v, lengths, k_scale=ks, v_scale=vs)
    view = KVView.create(
        paged(k), paged(v), lengths, page_table=table.view(2, pages), k_scale=paged(ks),
        v_scale=paged(vs),
    )  # fmt: skip
    q = torch.randn(2, 5, q_len, dim, generator=generator).to(dtype)
    head_map = HeadMap([0, 1, 1, 0, 1])
    return tuple(view_call(q, x, head_map, window=(None, 0)) for x in (view, dense))


@pytest.mark.parametrize("q_len", [1, 30])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_pages_change_no_bit(isa, page_size, name, q_len):  # noqa: F811
    paged, dense = paged_call(torch.bfloat16, name, q_len, page_size=page_size)
    for got, expected in zip(CPU.attend(paged), CPU.attend(dense), strict=True):
        assert torch.equal(got, expected)


def test_ragged_queries_are_the_sequences_one_by_one(isa):  # noqa: F811
    paged, _ = paged_call(torch.float32, q_len=3)
    q = torch.randn(9, 5, 64)
    offsets = torch.tensor([0, 4, 7], dtype=torch.int32)  # 2 tokens more than sequences have
    out, lse = CPU.attend(
        view_call(q, paged.kv, paged.head_map, cu_seqlens_q=offsets, window=(None, 0))
    )
    for b in range(2):
        tokens = slice(offsets[b], offsets[b + 1])
        view = replace(
            paged.kv,
            kv_lengths=paged.kv.kv_lengths[b : b + 1],
            page_table=paged.kv.page_table[b : b + 1],
        )
        alone = paged.replace(q=q[tokens].transpose(0, 1)[None], kv=view)
        expected_out, expected_lse = CPU.attend(alone)
        assert torch.equal(out[:, :, tokens], expected_out)
        assert torch.equal(lse[:, :, tokens], expected_lse)
    assert (out[:, :, 7:] == 0).all() and (lse[:, :, 7:] == -torch.inf).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_every_stored_number(isa, name):  # noqa: F811
    """One key is attention's whole result: its value, exactly."""
    form = FORMAT_OF_NAME[name]
    codes = torch.arange(256, dtype=torch.uint8).view(256 // 16, 1, 1, 16)
    v = codes.view(form.storage)
    k = torch.zeros_like(codes).view(form.storage)
    scale = torch.full((1,), 0.5).expand(16, 1, 1)
    length = torch.ones(16, dtype=torch.int32)
    view = KVView.create(k, v, length, k_scale=scale, v_scale=scale)
    q = torch.ones(16, 1, 1, view.head_dim)
    out, _ = CPU.attend(view_call(q, view, HeadMap([0])))
    if form.per_byte == 2:
        numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
    else:
        numbers = v.float()
    expected = (numbers - form.default_zero) * 0.5
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [None, *(x for x in QUANTISED if x != "int4")])
def test_v_may_be_a_view_of_k(isa, name):  # noqa: F811
    """A latent cache: V is the first 512 of the 576 numbers that a token has, its scale K's."""
    paged, _ = paged_call(torch.bfloat16, name, dim=576)
    view = paged.kv
    latent = KVView.create(
        view.k, view.k[..., :512], view.kv_lengths, page_table=view.page_table,
        k_scale=view.k_scale, v_scale=view.k_scale,
    )  # fmt: skip
    for q_len in (1, 30):
        q = torch.randn(2, 5, q_len, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
        inputs = paged.replace(q=q, kv=latent)
        assert_cache_close(CPU.attend(inputs)[0], inputs)


@pytest.mark.parametrize("q_len", [1, 30])
@pytest.mark.parametrize("name", FORMATS)
def test_a_page_out_of_range_is_nan_where_it_is_seen(isa, name, q_len):  # noqa: F811
    paged, _ = paged_call(torch.bfloat16, name, q_len)
    paged = paged.replace(window_left=100)
    good, _ = CPU.attend(paged)
    position = 300 - q_len + torch.arange(q_len)
    sees = (position >= 144) & (position - 100 < 160)  # page 9
    for bad in (-1, paged.kv.num_pages, 2**31 - 1, -(2**31)):
        table = paged.kv.page_table.clone()
        table[0, 0, 9] = bad
        out, lse = CPU.attend(paged.replace(kv=replace(paged.kv, page_table=table)))
        lost = torch.zeros(2, 5, q_len, dtype=torch.bool)
        lost[0, [0, 3]] = sees
        assert torch.equal(lse.isnan(), lost)
        assert torch.equal(out.isnan(), lost[..., None].expand_as(out))
        assert torch.equal(out[~lost], good[~lost])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -1])
def test_nan_with_any_payload_is_seen(isa, bits):  # noqa: F811
    paged, _ = paged_call(torch.float32)
    paged.kv.k[paged.kv.page_table[0, 0, 3], 0, 5, 7] = torch.tensor(bits, dtype=torch.int32).view(
        torch.float32
    )
    out, lse = CPU.attend(paged)
    assert out[0, [0, 3]].isnan().all() and lse[0, [0, 3]].isnan().all()
    assert out[0, [1, 2, 4]].isfinite().all()


def random_append(seed, dtype, name):
    """Inputs of an append; some tokens have no slot or no page, some are not finite."""
    rnd, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    view = random_view(rnd, generator, dtype, name)
    if name is not None and rnd.random() < 0.4:  # scales given for each head
        view = replace(view, k_zero=None, v_zero=None, **{
            f"{side}_scale": (torch.rand(view.num_k_heads, generator=generator) / 20)[
                None, :, None].expand(view.num_pages, -1, view.page_size) for side in "kv"
        })  # fmt: skip
    if rnd.random() < 0.3:
        table = view.page_table.clone()
        table[0, 0, 0] = rnd.choice([-1, view.num_pages, 2**31 - 1])
        view = replace(view, page_table=table)
    offsets, leading, tokens = None, view.batch, rnd.choice([1, 3, 9])
    if rnd.random() < 0.4:
        counts = [rnd.choice([0, 1, 2, 7]) for _ in range(view.batch)]
        offsets = torch.tensor([0, *itertools.accumulate(counts)]).int()
        leading, tokens = 1, sum(counts) + rnd.randint(0, 2)
    size = rnd.choice([1.0, 1e-3, 300.0])
    k_new, v_new, q = (
        (size * torch.randn(leading, tokens, heads, dim, generator=generator))
        .to(dtype)
        .transpose(1, 2)
        for heads, dim in (
            (view.num_k_heads, view.head_dim),
            (view.num_v_heads, view.value_head_dim),
            (4, view.head_dim),
        )
    )
    if tokens and rnd.random() < 0.2:
        v_new[0, 0, 0, 0] = rnd.choice([torch.nan, torch.inf])
    cos = sin = None
    if rnd.random() < 0.7:
        angle = 6 * torch.rand(
            rnd.choice([5, 400]), rnd.randint(1, view.head_dim // 2), generator=generator
        )
        cos, sin = angle.cos(), angle.sin().to(rnd.choice([dtype, torch.float32]))
    shares_lengths = view.kv_lengths.stride(1) == 0
    return AppendCall(
        q if cos is not None and shares_lengths else None, k_new, v_new, view, offsets, tokens,
        cos, sin, rnd.random() < 0.5,
    )  # fmt: skip


def after(append, inputs):
    """Everything that an append writes, from a copy of the cache."""
    parts = ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")
    memory = {part: getattr(inputs.kv, part) for part in parts}
    memory = {part: x if x is None or 0 in x.stride() else x.clone() for part, x in memory.items()}
    rotated = append(replace(inputs, kv=replace(inputs.kv, **memory)))
    return {"q": rotated, **memory}


def assert_same(got, expected, seed):
    """Bit for bit, but for the many forms of a NaN."""
    for part, y in expected.items():
        x = got[part]
        if y is None:
            assert x is None
            continue
        if x.element_size() == 1:
            x, y = x.view(torch.uint8), y.view(torch.uint8)
        same = (x == y) | ((x != x) & (y != y))
        assert same.all(), f"seed {seed}: {int((~same).sum())} elements of {part} differ"


@pytest.mark.parametrize("name", FORMATS)
def test_append_stores_what_the_definition_says(name):
    for seed in range(40):
        inputs = random_append(seed, DTYPES[seed % 3], name)
        assert_same(after(CPU.append, inputs), after(reference_append, inputs), seed)


def test_append_drops_what_has_no_slot():
    memory = torch.zeros(4, 1, 2, 8)
    view = KVView.create(memory[1:3], memory[1:3], torch.tensor([3]),
                         page_table=torch.tensor([[1, 0]]))  # fmt: skip
    new = torch.ones(1, 1, 5, 8)
    CPU.append(AppendCall(None, new, new, view, None, 5, None, None, False))
    expected = torch.zeros_like(memory)
    expected[1, 0, 1] = 1  # slot 3: page 0 of the view
    assert torch.equal(memory, expected)


def test_append_is_the_same_on_any_number_of_threads():
    memory = []
    before = torch.get_num_threads()
    new = torch.randn(3, 4, 200, 64)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            k = torch.zeros(3, 4, 256, 64)
            view = KVView.create(k, k, torch.tensor([0, 9, 50]))
            CPU.append(AppendCall(None, new, new, view, None, 200, None, None, False))
        finally:
            torch.set_num_threads(before)
        memory.append(k)
    assert torch.equal(memory[0][1, :, 9:209], new[1])
    assert torch.equal(memory[0], memory[1]) and torch.equal(memory[0], memory[2])


def forward_arguments(call):
    return dict(zip(FORWARD.names, FORWARD.arguments_of(call), strict=True))


@pytest.mark.parametrize("seed, name", [(0, None), (1, "int4"), (2, "int8")])
def test_opcheck(seed, name):
    op = torch.ops.gqa_kernels
    inputs = random_call(seed, torch.float32, name)
    torch.library.opcheck(op.attention_forward.default, tuple(forward_arguments(inputs).values()))
    call = random_append(seed, torch.float32, name)
    torch.library.opcheck(op.cache_append.default, APPEND.arguments_of(call))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"v": torch.zeros(38, 2, 16, 64)},
            "v must have dtype BFloat16, or .*, got Float",
        ),
        (
            {"k": torch.zeros(38, 2, 16, 64, dtype=torch.int16)},
            "k must have q's dtype, or .* got Short",
        ),
        (
            {"page_table": torch.zeros(2, 2, 19)},
            "page_table must have dtype Int, got Float",
        ),
        (
            {"page_table": torch.zeros(1, 2, 19, dtype=torch.int32)},
            r"page_table must have shape \(2, 2, 19\), got \(1, 2, 19\)",
        ),
        (
            {"k": torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16), "page_table": None},
            "k must have a page for each of 2 sequences",
        ),
        ({"kv_begin": torch.tensor([0, -1]).int()}, r"kv_begin must lie in \[0, 304\], got -1"),
        ({"kv_begin": torch.tensor([0, 305]).int()}, r"kv_begin must lie in \[0, 304\], got 305"),
        (
            {"q": torch.zeros(1, 5, 3, 64).bfloat16(), "q_offsets": torch.tensor([0, 2, 1]).int()},
            "q_offsets must ascend from 0 to at most q's tokens .3., got 1 after 2",
        ),
        (
            {"q": torch.zeros(1, 5, 3, 64).bfloat16(), "q_offsets": torch.tensor([0, 2, 4]).int()},
            "q_offsets must ascend from 0 to at most q's tokens .3., got 4 after 2",
        ),
        (
            {"q": torch.zeros(1, 5, 3, 64).bfloat16(), "q_offsets": torch.tensor([1, 2, 3]).int()},
            "q_offsets must ascend from 0 to at most q's tokens .3., got 1 after 0",
        ),
        (
            {"k_scale": torch.ones(38, 2, 16)},
            "k_scale must be None where k has q's dtype",
        ),
    ],
)
def test_op_refuses_what_memory_safety_forbids(changes, message):
    paged, _ = paged_call(torch.bfloat16)
    arguments = {**forward_arguments(paged), **changes}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gqa_kernels.attention_forward.default(*arguments.values())


def test_append_needs_a_key_head():
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="k must have at least 1 head, got 0"):
        torch.ops.gqa_kernels.cache_append.default(
            x[:, :0, :1], x[:, :, :1], x[:, :0].clone(), x, torch.zeros(1, 0).int(), 1
        )
