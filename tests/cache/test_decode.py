"""Attention over every kind of cache, on every backend that says it can."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    available_backends,
    explain_backend,
)
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.decode import view_call
from gqa_kernels.testing import assert_attention_close, assert_decode_close
from tests.api.test_attention import widest
from tests.cases.attention import INTERLEAVED, UNEVEN, WITH_EMPTY, interpreted
from tests.cases.caches import (
    KINDS,
    Kind,
    empty_cache,
    fill,
    format_error,
    hide_unused_pages,
    random_history,
)
from tests.conftest import DEVICE


def usable(name: str) -> bool:
    """Whether a backend has cache kernels here."""
    if DEVICE not in BACKENDS[name].capabilities.devices:
        return False
    cache = DenseKVCache.empty(1, 1, 2, 8, dtype=widest(name), device=DEVICE)
    q = torch.zeros(1, 1, 1, 8, dtype=widest(name), device=DEVICE)
    return not explain_backend(asym_gqa_decode, q, cache, [0])[name]


USABLE = [name for name in available_backends() if usable(name)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATRIX = [
    pytest.param(kind, name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}-{kind}")
    for name in USABLE
    for i, kind in enumerate(KINDS)
    for dtype in ([DTYPES[i % 3]] if name == "triton" else DTYPES)  # interpreted: one of each
    if kind.caches <= BACKENDS[name].capabilities.caches
    and dtype in BACKENDS[name].capabilities.dtypes
]
LENGTHS = [37, 0, 5]


def filled(
    kind, dtype, device, lengths=tuple(LENGTHS), head_map=UNEVEN, dim=16, value_dim=24, room=False,
    backend="reference", **sizes,
):  # fmt: skip
    """A cache with tokens that a backend appended, and the tokens; without ``room`` unused page
    ids are garbage."""
    generator = torch.Generator().manual_seed(3)
    value_dim = dim if kind.order == "packed" else value_dim
    cache = empty_cache(
        kind, len(lengths), 40, head_map, dim, value_dim, dtype, device, generator, **sizes
    )
    truth = fill(cache, list(lengths), generator, backend, dtype)
    if not room:
        hide_unused_pages(cache)
    return cache, truth


def queries(batch, head_map, q_len, dim, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, head_map.num_heads, q_len, dim)
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("kind, backend, dtype", MATRIX)
def test_matches_the_stored_tokens(kind, backend, dtype, device):
    """One query (decode), and more queries than some sequence has keys (a chunk of prefill)."""
    # What interpreted Triton appends is held to the reference's, bit for bit, in test_append.py.
    appends = "reference" if interpreted(backend) else backend
    cache, truth = filled(kind, dtype, device, backend=appends)
    for q_len in (1, 20):
        q = queries(3, UNEVEN, q_len, 16, dtype, device)
        out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend=backend)
        assert_decode_close(out, q, cache, UNEVEN, lse=lse)
        if kind.format is None:  # and against tokens that no cache has seen
            k, v, lengths = truth.dense()
            k, v = (x.to(device, dtype) for x in (k, v))
            lengths = torch.tensor(lengths, device=device)
            assert_attention_close(out, q, k, v, UNEVEN, lse=lse, kv_lengths=lengths, causal=True)


OPTIONS = {
    "window": {"window": (9, None)},
    "not-causal": {"causal": False},
    "scores": {"softcap": 2.0, "scale": 0.4, "alibi_slopes": torch.linspace(0.1, 0.9, 6)},
    "sinks": {"sinks": torch.linspace(-2, 3, 6)},
    "mask": {"attn_mask": lambda n: torch.arange(n) % 3 > 0},
    "value-map": {"value_head_map": HeadMap([0, 1, 1, 0, 0, 1])},
}


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_over_pages(backend, name, device):
    kind = Kind(16, "NHD", format="int8") if name == "value-map" else Kind(3, begin=True)
    heads = 2 if name == "value-map" else None
    cache, _ = filled(kind, widest(backend), device, value_heads=heads)
    options = {
        key: value(cache.view().capacity) if callable(value) else value
        for key, value in OPTIONS[name].items()
    }
    options = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    q = queries(3, UNEVEN, 4, 16, widest(backend), device)
    out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend=backend, **options)
    assert_decode_close(out, q, cache, UNEVEN, lse=lse, **options)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("head_map", [INTERLEAVED, WITH_EMPTY], ids=["interleaved", "with-empty"])
def test_lengths_and_pages_per_head(backend, head_map, device):
    """Budgets per head, as KV compression keeps them: each page belongs to one head."""
    heads, page_size, max_pages = head_map.num_kv_heads, 4, 6
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 22, (2, heads), generator=generator)
    lengths[0, 0] = 0
    table = torch.randperm(2 * heads * max_pages + 4, generator=generator)[: 2 * heads * max_pages]
    table = table.view(2, heads, max_pages)
    shape, dtype = (table.numel() + 4, page_size, 16), widest(backend)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    dense = [x[table].flatten(2, 3).to(device) for x in (k, v)]
    table[torch.arange(max_pages) * page_size >= lengths[..., None]] = -7
    cache = PagedKVCache(
        k.to(device), v.to(device), table.to(device), lengths.to(device, torch.int32)
    )
    for q_len in (1, 3):
        q = queries(2, head_map, q_len, 16, dtype, device)
        out, lse = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
        options = {"kv_lengths": lengths.to(device), "causal": True}
        assert_attention_close(out, q, *dense, head_map, lse=lse, **options)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", [Kind(), Kind(3), Kind(16, format="fp8_e4m3")], ids=str)
def test_packed_queries(backend, kind, device):
    cache, _ = filled(kind, widest(backend), device)
    q = queries(1, UNEVEN, 30, 16, widest(backend), device)[0].transpose(0, 1).contiguous()
    offsets = torch.tensor([0, 21, 22, 30], device=device)  # the second sequence has no keys
    options = {"cu_seqlens_q": offsets, "max_seqlen_q": 25, "window": (8, None)}
    out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend=backend, **options)
    assert out.is_contiguous() and out.shape == (30, 6, 24) and lse.shape == (6, 30)
    assert_decode_close(out, q, cache, UNEVEN, lse=lse, **options)


HISTORIES = [
    Kind(1, "NHD"),
    Kind(3),
    Kind(16, "NHD"),
    Kind(64),
    Kind(256),
    Kind(1, format="int4", zeros=True),
    Kind(3, "NHD", format="fp8_e4m3"),
    Kind(16, format="int8"),
    Kind(64, "NHD", format="int8", zeros=True),
    Kind(256, format="fp8_e5m2"),
]


@pytest.mark.parametrize(
    "kind, backend",
    [
        pytest.param(kind, name, marks=pytest.mark.slow if interpreted(name) and i % 2 else ())
        for i, kind in enumerate(HISTORIES)
        for name in USABLE
    ],
    ids=str,
)
def test_random_histories(backend, kind, device):
    """After allocations, appends, forks and frees every sequence still has its own tokens; garbage
    in slots and page ids that none uses."""
    dtype = widest(backend)
    history = random_history(HISTORIES.index(kind), kind, backend, dtype, device)
    names = list(history.tokens)
    cache = history.at(history.allocator.batch(names))
    hide_unused_pages(cache)
    head_map = HeadMap([1, 0, 1])
    q = queries(len(names), head_map, 2, 16, dtype, device)
    out, lse = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
    assert_decode_close(out, q, cache, head_map, lse=lse)
    stored = gather(cache.view())
    for b, name in enumerate(names):
        k, v = (x[None].to(device) for x in history.tokens[name])
        for side, got, x in zip("kv", stored, (k, v), strict=False):
            error = (got[b : b + 1, :, : x.shape[2]].float() - x.float()).abs()
            assert (error <= format_error(x.float(), side, kind)).all()
        if kind.format is None:
            one = slice(b, b + 1)
            assert_attention_close(out[one], q[one], k, v, head_map, lse=lse[one], causal=True)


GIVEN = {  # scales for the tensor or for each head, with zeros or without
    "fp8_e4m3": (torch.float8_e4m3fn, {}),
    "fp8_e5m2": (torch.float8_e5m2, {}),
    "int8": (torch.int8, {"k_zero": 3.0, "v_zero": torch.tensor([0.0, -5.0])}),
    "int4": (torch.uint8, {"k_zero": torch.tensor([7.0, 9.0])}),
}


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("format", GIVEN)
def test_given_scales(backend, format, device):
    """Of the whole tensor for K and of each head for V, with zeros or without."""
    storage, zeros = GIVEN[format]
    generator = torch.Generator().manual_seed(0)
    width = 8 if format == "int4" else 16
    high = 256 if storage == torch.uint8 else 120  # below fp8's NaN
    k, v = (
        torch.randint(0, high, (6, 2, 4, width), generator=generator, dtype=torch.uint8)
        .view(storage)
        .to(device)
        for _ in range(2)
    )
    scales = {"k_scale": 2.0**-9, "v_scale": torch.tensor([0.25, 2.0]), **zeros}
    scales = {n: x.to(device) if torch.is_tensor(x) else x for n, x in scales.items()}
    table = torch.tensor([[5, 0, 3], [2, 1, 4]], device=device)
    lengths = torch.tensor([11, 6], dtype=torch.int32, device=device)
    cache = PagedKVCache(k, v, table, lengths, **scales)
    head_map = HeadMap([1, 0, 1])
    q = queries(2, head_map, 3, 16, widest(backend), device)
    out, lse = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
    assert_decode_close(out, q, cache, head_map, lse=lse)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", [Kind(), Kind(3, begin=True)], ids=str)
def test_lengths_that_the_host_cant_see_are_clamped(backend, kind, device):
    """To the range from 0 to the slots of a sequence, so nothing is read out of bounds."""
    cache, _ = filled(kind, widest(backend), device, room=True)
    for x in (cache.k, cache.v):
        x.nan_to_num_(0)
    q = queries(3, UNEVEN, 2, 16, widest(backend), device)
    inputs = view_call(q, cache.view(), UNEVEN)
    begin = 0 if cache.begin is None else cache.begin[0]
    results = []
    for lengths in ((2**31 - 1, -(2**31), 5), (inputs.kv.capacity - begin, 0, 5)):
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        view = replace(inputs.kv, kv_lengths=lengths[:, None].expand(3, 3))
        results.append(BACKENDS[backend].attend(inputs.replace(kv=view)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("q_len", [1, 20])
def test_page_out_of_range_that_the_host_cant_see(backend, q_len, device):
    """No read out of bounds, NaN for every row that sees the page, and for no other."""
    cache, _ = filled(Kind(3), widest(backend), device, lengths=(37, 9, 20))
    q = queries(3, UNEVEN, q_len, 16, widest(backend), device)
    inputs = view_call(q, cache.view(), UNEVEN, window=(11, None))
    good, _ = BACKENDS[backend].attend(inputs)
    for bad in (-1, 2**31 - 1, cache.k.shape[0]) if q_len == 1 else (-1,):
        table = cache.page_table.clone()
        table[0, 8] = bad  # keys 24 to 26
        table[1, 0] = bad  # keys 0 to 2
        view = replace(inputs.kv, page_table=table[:, None].expand(-1, 3, -1))
        out, lse = BACKENDS[backend].attend(inputs.replace(kv=view))
        position = torch.arange(q_len) - q_len + torch.tensor([37, 9, 20])[:, None]
        lost = (position >= 24) & (position - 11 <= 26)
        lost[1] = (position[1] >= 0) & (position[1] - 11 <= 2)
        lost[2] = False
        assert torch.equal(out.isnan().all(-1).all(1).cpu(), lost)
        assert torch.equal(lse.isnan().all(1).cpu(), lost)
        kept = ~lost.to(device)[:, None].expand(-1, 6, -1)
        torch.testing.assert_close(out[kept], good[kept])


@pytest.mark.parametrize("backend", USABLE)
def test_nothing_to_do(backend, device):
    cache, _ = filled(Kind(3), widest(backend), device)
    q = queries(3, UNEVEN, 0, 16, widest(backend), device)
    assert asym_gqa_decode(q, cache, UNEVEN, backend=backend).shape == (3, 6, 0, 24)
    none = cache.at(cache.page_table[:0], cache.lengths[:0])
    assert asym_gqa_decode(q[:0], none, UNEVEN, backend=backend).shape == (0, 6, 0, 24)


@pytest.mark.parametrize("backend", USABLE)
def test_layouts_agree(backend, device):
    cache, _ = filled(Kind(16), widest(backend), device)
    q = queries(3, UNEVEN, 3, 16, widest(backend), device)
    expected = asym_gqa_decode(q, cache, UNEVEN, backend=backend)
    q = q.transpose(1, 2).contiguous()
    out = asym_gqa_decode(q, cache, UNEVEN, layout="bshd", backend=backend)
    assert out.is_contiguous() and torch.equal(out.transpose(1, 2), expected)


def test_matches_dense_attention_bit_for_bit(device):
    """A dense cache that is full is the plain call: the reference must not differ at all."""
    cache, _ = filled(Kind(), torch.float32, device, lengths=(40, 40, 40))
    q = queries(3, UNEVEN, 3, 16, torch.float32, device)
    out = asym_gqa_decode(q, cache, UNEVEN, backend="reference")
    args = (q, cache.k, cache.v, UNEVEN)
    assert torch.equal(out, asym_gqa_attention(*args, causal=True, backend="reference"))
