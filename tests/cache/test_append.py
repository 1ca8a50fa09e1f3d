"""Appends: what is stored and how queries are rotated, on every backend against the definition."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels import DenseKVCache, PagedKVCache, asym_gqa_decode
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.call.append import AppendCall
from gqa_kernels.testing import assert_decode_close
from tests.cache.test_decode import USABLE
from tests.cases.appends import FORMATS, rotary_table
from tests.cases.attention import UNEVEN
from tests.cases.caches import Kind, empty_cache, fill, format_error

K8V4 = [Kind(4, format="k8v4"), Kind(format="k8v4", zeros=True)]  # not in CUDA C++


def stored(cache):
    """Everything in the cache's memory; fp8 as bytes, NaN as a number."""
    tensors = [cache.k, cache.v, *(x for x in cache.scales.values() if x is not None)]
    return [
        x.view(torch.uint8) if x.element_size() == 1 else x.nan_to_num(nan=12345.0) for x in tensors
    ]


def appended(kind, backend, device, **rotary):
    """A cache after a ragged append behind tokens that are there, and the queries rotated."""
    generator = torch.Generator().manual_seed(5)
    dtype = torch.float32 if kind.format else torch.bfloat16
    dim = 16 if kind.order == "packed" else 24
    cache = empty_cache(kind, 3, 20, UNEVEN, 16, dim, dtype, device, generator)
    cache.lengths.copy_(torch.tensor([3, 0, 7]))
    q, new, values = (
        torch.randn(9, heads, columns, generator=generator).to(device, dtype)
        for heads, columns in ((6, 16), (3, 16), (3, dim))
    )
    new[4] = 0  # a row of zeros has scale 0
    offsets = torch.tensor([0, 3, 3, 9], device=device)
    q = cache.append(new, values, q=q, cu_seqlens=offsets, max_seqlen=6, backend=backend, **rotary)
    assert cache.lengths.tolist() == [6, 0, 13]
    return cache, q


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
@pytest.mark.parametrize("kind", [*FORMATS, *K8V4], ids=str)
def test_stores_what_the_definition_says(backend, kind, device):
    """Bit for bit, in used and unused slots."""
    expected, got = (appended(kind, name, device)[0] for name in ("reference", backend))
    for x, y in zip(stored(expected), stored(got), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", [Kind(3, "NHD"), Kind(4, format="int4", zeros=True)], ids=str)
def test_rotates_as_the_definition_says(backend, interleaved, kind, device):
    """Rotates columns 0 to 7 of 16. A fused multiply-add may change a rounding, and with it a
    quantised number."""
    cos, sin = (x.to(device) for x in rotary_table(8))
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    (expected, q), (got, rotated) = (
        appended(kind, name, device, **rotary) for name in ("reference", backend)
    )
    torch.testing.assert_close(rotated, q)
    expected.lengths.copy_(torch.tensor([3, 0, 6]))  # of the new tokens only
    got.lengths.copy_(expected.lengths)
    begin = torch.tensor([3, 0, 7], dtype=torch.int32, device=device)
    (k, v, _), (got_k, got_v, _) = (
        gather(cache.at(cache.page_table, cache.lengths, begin=begin).view())
        for cache in (expected, got)
    )
    assert torch.equal(got_v, v)
    step = 0.5 if kind.format else 0.0  # of int4, for rows of normal numbers
    torch.testing.assert_close(got_k, k, rtol=1.6e-2, atol=step + 1e-5)
    assert (got_k == k).float().mean() > 0.99


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_rotation_is_a_rotation_by_the_position(backend, interleaved, layout, device):
    """Against complex numbers: pair p of a token at position t turns by t * theta_p."""
    cache = DenseKVCache.empty(2, 3, 12, 16, dtype=torch.float32, device=device)
    cache.lengths.copy_(torch.tensor([4, 0]))
    q, k, v = (torch.randn(2, heads, 5, 16) for heads in (6, 3, 3))
    cos, sin = (x.to(device) for x in rotary_table(12))
    args = [x.to(device) if layout == "bhsd" else x.to(device).transpose(1, 2) for x in (k, v, q)]
    rotated = cache.append(
        *args[:2], q=args[2], rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved,
        layout=layout, backend=backend,
    )  # fmt: skip
    rotated = rotated if layout == "bhsd" else rotated.transpose(1, 2)
    pairs = torch.arange(12).view(6, 2) if interleaved else torch.arange(12).view(2, 6).T
    position = torch.tensor([4, 0])[:, None] + torch.arange(5)
    theta = 10000.0 ** -(torch.arange(0, 12, 2) / 12)
    turn = torch.polar(torch.ones(()), position[..., None] * theta)[:, None]
    for x, result in ((q, rotated), (k, torch.stack([cache.k[0, :, 4:9], cache.k[1, :, :5]]))):
        number = torch.complex(x[..., pairs[:, 0]], x[..., pairs[:, 1]]) * turn
        expected = x.clone()
        expected[..., pairs[:, 0]], expected[..., pairs[:, 1]] = number.real, number.imag
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-5)
    stored_v = torch.stack([cache.v[0, :, 4:9], cache.v[1, :, :5]])
    assert torch.equal(stored_v.cpu(), v)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["full width", "strided", "fp16", "bf16", "fp64", "mixed"])
def test_forms_of_a_rotary_table(form, interleaved, backend, device):
    """Whatever form holds the angles, the rotation is the same."""
    cos, sin = (x.to(device) for x in rotary_table(16))
    if form in ("fp16", "bf16", "mixed"):  # the same angles, rounded
        cos, sin = (x.to(torch.bfloat16 if form == "bf16" else torch.float16) for x in (cos, sin))

    def rotated(cos, sin):
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(2, h, 5, 16, generator=generator).to(device) for h in (6, 3))
        cache = DenseKVCache.empty(2, 3, 9, 16, dtype=torch.float32, device=device)
        q = cache.append(k, k, q=q, rotary_cos=cos, rotary_sin=sin, backend=backend,
                         rotary_interleaved=interleaved)  # fmt: skip
        return q, cache.k[:, :, :5]

    def changed(x):
        if form == "full width":
            return x.repeat_interleave(2, 1) if interleaved else x.repeat(1, 2)
        if form == "strided":
            return x.T.contiguous().T
        return x.double() if form == "fp64" else x

    other = (changed(cos), sin.float()) if form == "mixed" else (changed(cos), changed(sin))
    for x, y in zip(rotated(cos.float(), sin.float()), rotated(*other), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", [*(x for x in FORMATS if x.format), *K8V4], ids=str)
def test_error_of_the_format(backend, kind, device):
    """Stored values are as near to the tokens as the format's definition allows."""
    generator = torch.Generator().manual_seed(2)
    cache = empty_cache(kind, 2, 30, UNEVEN, 16, 16, torch.float32, device, generator)
    truth = fill(cache, [11, 30], generator, backend=backend)
    k, v, _ = gather(cache.view())
    for b, n in enumerate([11, 30]):
        for side, got, expected in (
            ("k", k[b, :, :n], truth.k[b]), ("v", v[b, :, :n], truth.v[b])
        ):  # fmt: skip
            error = (got.cpu() - expected).abs()
            assert (error <= format_error(expected, side, kind)).all()
            assert error.max() > 0  # it is quantised


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_given_scales_saturate_and_stay(backend, dtype, device):
    """One scale per tensor for K and one per head for V: stored by them, and not touched."""
    width = 8 if dtype == torch.uint8 else 16
    k, v = (torch.zeros(4, 3, 2, width, device=device).to(dtype) for _ in range(2))
    v_scale = torch.tensor([0.5, 0.25, 2.0], device=device)
    table = torch.arange(4, device=device).view(2, 2)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    cache = PagedKVCache(k, v, table, lengths, k_scale=0.25, v_scale=v_scale)
    new = torch.linspace(-2000, 2000, 2 * 3 * 3 * 16, device=device).view(2, 3, 3, 16)
    cache.append(new, new, backend=backend)
    low, high = {torch.float8_e4m3fn: (-448, 448), torch.int8: (-128, 127),
                 torch.uint8: (-8, 7)}[dtype]  # fmt: skip
    got_k, got_v, _ = gather(cache.view())
    for got, scale in ((got_k, torch.tensor(0.25)), (got_v, v_scale.cpu()[:, None, None])):
        expected = (new.cpu() / scale).clamp(low, high)
        if dtype == torch.float8_e4m3fn:
            expected = expected.to(dtype).float()
        else:
            expected = expected.round()
        assert torch.equal(got[:, :, :3].cpu(), expected * scale)
    assert v_scale.tolist() == [0.5, 0.25, 2.0]


@pytest.mark.parametrize("backend", USABLE)
def test_angles_of_each_token(backend, device):
    """mrope (Qwen2-VL): each token has three positions, which share the columns of its angles."""
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(0, 50, (3, 2, 5), generator=generator)
    angles = position[..., None] * 10000 ** (-torch.arange(8) / 8)
    angles = torch.cat([part[i] for i, part in enumerate(angles.split((2, 3, 3), -1))], -1)
    cos, sin = (x.flatten(0, 1).to(device) for x in (angles.cos(), angles.sin()))
    cache = DenseKVCache.empty(2, 3, 8, 16, dtype=torch.float32, device=device)
    k, v, q = (torch.randn(2, heads, 5, 16, generator=generator) for heads in (3, 3, 6))
    turned = cache.append(
        k.to(device), v.to(device), q=q.to(device), rotary_cos=cos, rotary_sin=sin,
        rotary_positions=torch.arange(10, device=device).view(2, 5), backend=backend,
    )  # fmt: skip
    stored, _, _ = gather(cache.view())
    cos, sin = (x[:, None].repeat(1, 1, 1, 2) for x in (angles.cos(), angles.sin()))
    for found, x in ((stored[:, :, :5], k), (turned, q)):
        half = torch.cat([-x[..., 8:], x[..., :8]], -1)
        torch.testing.assert_close(found.cpu(), x * cos + half * sin)


@pytest.mark.parametrize("backend", USABLE)
def test_scales_of_each_sequence_and_head(backend, device):
    """``[B, Hk]``, as FlashAttention-3 has descale factors: the append and attention read them."""
    k, v = (torch.zeros(2, 3, 8, 16, dtype=torch.int8, device=device) for _ in range(2))
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    scale = (torch.arange(6, device=device).float().view(2, 3) + 1) / 64
    cache = DenseKVCache(k, v, lengths, k_scale=scale, v_scale=scale.flip(0))
    new = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).to(device)
    q = torch.randn(2, 6, 2, 16, device=device)
    cache.append(new, new, backend=backend)
    got_k, got_v, _ = gather(cache.view())
    for got, each in ((got_k, scale), (got_v, scale.flip(0))):
        each = each.cpu()[:, :, None, None]
        expected = (new.cpu() / each).round().clamp(-128, 127) * each
        assert torch.equal(got[:, :, :5].cpu(), expected)
    out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend=backend)
    assert_decode_close(out, q, cache, UNEVEN, lse=lse)


@pytest.mark.parametrize("backend", USABLE)
def test_tokens_without_a_place_are_dropped(backend, device):
    """Where the host can't see it: beyond the table, and in pages out of range."""
    pages = torch.full((4, 3, 2, 16), torch.nan, device=device)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    cache = PagedKVCache(pages, pages.clone(), table, lengths)
    new = torch.ones(2, 3, 3, 16, device=device)
    inputs = AppendCall.create(new, new, cache.view())
    lengths = torch.tensor([2, 1], dtype=torch.int32, device=device)
    table = torch.tensor([[0, 1], [4, -1]], dtype=torch.int32, device=device)
    view = replace(
        inputs.kv,
        kv_lengths=lengths[:, None].expand(2, 3),
        page_table=table[:, None].expand(2, 3, 2),
    )
    BACKENDS[backend].append(replace(inputs, kv=view))
    written = pages.isfinite().all(-1).all(1)
    assert written.tolist() == [[False, False], [True, True], [False, False], [False, False]]


@pytest.mark.parametrize("backend", USABLE)
def test_heads_with_lengths_of_their_own(backend, device):
    """A page of one head each; the tokens of a head go behind its own length."""
    table = torch.arange(8, device=device).view(2, 2, 2)
    k, v = (torch.full((8, 3, 16), torch.nan, device=device) for _ in range(2))
    lengths = torch.tensor([[0, 4], [2, 1]], dtype=torch.int32, device=device)
    cache = PagedKVCache(k, v, table, lengths)
    new = torch.randn(2, 2, 2, 16, device=device)
    cache.append(new, 2 * new, backend=backend)
    assert lengths.tolist() == [[2, 6], [4, 3]]
    for b in range(2):
        for h in range(2):
            n = int(lengths[b, h])
            row = k[table[b, h]].flatten(0, 1)
            assert torch.equal(row[n - 2 : n], new[b, h]) and row[: n - 2].isnan().all()
            assert torch.equal(v[table[b, h]].flatten(0, 1)[n - 2 : n], 2 * new[b, h])
