"""Caches that store keys rotated, or divided by channels: the same attention, less error."""

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    available_backends,
    plan_decode,
)
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.cache.hadamard import block_size, rotate_by_hadamard
from gqa_kernels.testing import assert_attention_close, assert_decode_close
from tests.cases.attention import UNEVEN

BACKENDS = available_backends()
HADAMARD, CHANNELS = {"hadamard": True}, {"k_channels": True}
TRANSFORMS = {"hadamard": HADAMARD, "channels": CHANNELS, "both": HADAMARD | CHANNELS}


def transform(name, heads, dim, device="cpu"):
    """The arguments of a cache; channels from 0.1 to 10, both dims of a rotary pair alike."""
    given = dict(TRANSFORMS[name])
    if "k_channels" in given:
        generator = torch.Generator().manual_seed(2)
        exponent = torch.rand(heads, dim // 2, generator=generator) * 2 - 1
        given["k_channels"] = (10 ** exponent.repeat(1, 2)).to(device)
    return given


def matrix(dim):
    """The rotation written out: blocks of ``[[H, H], [H, -H]]``."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block_size(dim):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h * len(h) ** -0.5] * (dim // len(h)))


def rotary(positions, dim):
    angle = torch.arange(positions)[:, None] * 0.3 ** torch.arange(dim // 2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dim", [2, 16, 24, 64, 80, 96, 256])
def test_the_rotation(dim):
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    rotated = rotate_by_hadamard(x)
    torch.testing.assert_close(rotated, x @ matrix(dim))
    torch.testing.assert_close(rotate_by_hadamard(rotated), x)
    assert rotate_by_hadamard(x.bfloat16()).dtype == torch.bfloat16
    assert block_size(dim) == {24: 8, 80: 16, 96: 32}.get(dim, dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_attention_stays_what_it_is(name, paged, backend, device):
    """By appends with and without a rotary table, packed or not, plans, and writes to slots.

    The keys have the sizes that ``k_channels`` names, and the queries the inverse ones, so that no
    score is a small sum of large terms, whose rounding errors would be as large as the terms."""
    batch, dim, lengths = 2, 16, [0, 0]
    sizes = {"dtype": torch.float32, "device": device, **transform(name, 3, dim, device)}
    size = sizes.get("k_channels", torch.ones(3, dim, device=device))
    q_size = 1 / size[list(UNEVEN)]
    if paged:
        table = torch.tensor([[3, 0, 5, 1], [2, 4, 7, 6]], device=device)
        pool = PagedKVCache.empty(8, 8, 3, dim, **sizes)
        cache = pool.at(table, torch.tensor(lengths, dtype=torch.int32, device=device))
    else:
        cache = DenseKVCache.empty(batch, 3, 32, dim, **sizes)
    plain = DenseKVCache.empty(batch, 3, 32, dim, dtype=torch.float32, device=device)
    assert cache.key_transform is not None and plain.key_transform is None
    table = [x.to(device) for x in rotary(40, dim)]
    for tokens, rotates in ((5, True), (1, True), (4, False)):
        q, k, v = (torch.randn(batch, n, tokens, dim, device=device) for n in (6, 3, 3))
        q, k = q * q_size[:, None], k * size[:, None]
        given = dict(zip(("rotary_cos", "rotary_sin"), table, strict=True)) if rotates else {}
        out, expected = (
            asym_gqa_decode(q, x, UNEVEN, k_new=k, v_new=v, backend=backend, **given)
            for x in (cache, plain)
        )
        torch.testing.assert_close(out, expected)
    counts = torch.tensor([0, 2, 3], device=device)
    k, v = torch.randn(2, 3, 3, dim, device=device)
    q, k = torch.randn(3, 6, dim, device=device) * q_size, k * size
    for x in (cache, plain):
        rotated = x.append(k, v, q=q, cu_seqlens=counts, rotary_cos=table[0], rotary_sin=table[1])
        assert rotated.shape == q.shape and not torch.equal(rotated, q)
    slots = torch.tensor([0, 9], device=device)
    if not paged:
        for x in (cache, plain):
            x.write(k[:2], v[:2], slots, backend=backend)
    stored, _, _ = gather(plain.view())
    values = gather(plain.view())[1]
    n = int(cache.lengths.max())
    q = torch.randn(batch, 6, 2, dim, device=device) * q_size[:, None]
    out, lse = plan_decode(q, cache, UNEVEN, backend=backend)(q, cache, return_lse=True)
    assert_decode_close(out, q, cache, UNEVEN, lse=lse)
    assert torch.equal(cache.lengths, plain.lengths)
    if not paged:
        turned, _, _ = gather(cache.view())
        for b, length in enumerate(cache.lengths.tolist()):
            torch.testing.assert_close(
                turned[b, :, :length], cache.stored_keys(stored[b, :, :length])
            )  # fmt: skip
    assert_attention_close(
        asym_gqa_decode(q, plain, UNEVEN, backend=backend), q, stored[:, :, :n], values[:, :, :n],
        UNEVEN, causal=True, kv_lengths=plain.lengths,
    )  # fmt: skip


def outliers(generator, *shape):
    """Keys as models have them: few columns are much larger than the rest."""
    x = torch.randn(*shape, generator=generator)
    x[..., [3, 40]] *= 20
    return x


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("name", ["hadamard", "channels"])
def test_less_error(name, format):
    """The LSE's error: scores are where the stored keys go."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 8, 64, generator=generator)
    k, v = outliers(generator, 1, 3, 200, 64), torch.randn(1, 3, 200, 64, generator=generator)
    given = dict(TRANSFORMS[name])
    if "k_channels" in given:
        given["k_channels"] = k[0].abs().amax(1)
    found = {}
    for key, options in (
        ("exact", {}), ("plain", {"format": format}), ("less", {"format": format, **given})
    ):  # fmt: skip
        cache = DenseKVCache.empty(1, 3, 200, 64, dtype=torch.float32, **options)
        cache.append(k, v)
        found[key] = asym_gqa_decode(q, cache, UNEVEN, return_lse=True)[1]
    plain, less = ((found[key] - found["exact"]).abs().mean() for key in ("plain", "less"))
    assert less < plain / 2


def test_scales_per_channel():
    """int8 keys with a scale of each channel: what a stored number means."""
    k, v = torch.randn(2, 1, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    channels = k[0].abs().amax(1) / 127
    memory = torch.zeros(2, 1, 3, 16, 8, dtype=torch.int8)
    lengths = torch.zeros(1, dtype=torch.int32)
    cache = DenseKVCache(*memory, lengths, k_scale=1.0, v_scale=0.02, k_channels=channels)
    cache.append(k, v)
    assert torch.equal(cache.k[0, :, :9].float(), (k[0] / channels[:, None]).round())
    q = torch.randn(1, 6, 1, 8)
    dequantised = cache.k[:, :, :9].float() * channels[:, None]
    values = cache.v[:, :, :9].float() * 0.02
    out = asym_gqa_decode(q, cache, UNEVEN)
    torch.testing.assert_close(out, asym_gqa_attention(q, dequantised, values, UNEVEN))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_keep_and_per_head_lengths(name):
    """What moves keys moves them as stored; other memory holds such keys if its cache says so."""
    given = transform(name, 3, 8)
    cache = DenseKVCache.empty(1, 3, 16, 8, dtype=torch.float32, **given)
    plain = DenseKVCache.empty(1, 3, 16, 8, dtype=torch.float32)
    k, v = torch.randn(2, 1, 3, 10, 8)
    q = torch.randn(1, 6, 1, 8)
    kept = torch.rand(1, 3, 10) < 0.5
    for x in (cache, plain):
        x.append(k, v)
        x.keep(kept)
    out, expected = (asym_gqa_decode(q, x, UNEVEN) for x in (cache, plain))
    torch.testing.assert_close(out, expected)
    again = DenseKVCache(cache.k, cache.v, cache.lengths, **given)
    torch.testing.assert_close(asym_gqa_decode(q, again, UNEVEN), expected)
    cos, sin = rotary(20, 8)
    with pytest.raises(NotImplementedError, match="rotary_positions must be given, or"):
        again.append(k[:, :, :1], v[:, :, :1], rotary_cos=cos, rotary_sin=sin)
    for x in (cache, plain):  # keep() has set the next positions
        x.append(k[:, :, :1], v[:, :, :1], rotary_cos=cos, rotary_sin=sin)
    out, expected = (asym_gqa_decode(q, x, UNEVEN) for x in (cache, plain))
    torch.testing.assert_close(out, expected)


def test_errors():
    with pytest.raises(ValueError, match="hadamard must be False for an odd head dim, got 7"):
        DenseKVCache.empty(1, 1, 4, 7, dtype=torch.float32, hadamard=True)
    with pytest.raises(TypeError, match="hadamard must be True or False, got 'yes'"):
        PagedKVCache.empty(1, 4, 1, 8, hadamard="yes")
    for channels, error, message in (
        (torch.ones(2, 8), ValueError, r"k_channels must have shape \(1, 8\), \[Hk, D\], on cpu"),
        (torch.ones(1, 8).double(), TypeError, "k_channels.dtype must be float32"),
        (3, TypeError, "k_channels must be a torch.Tensor, got int"),
    ):
        with pytest.raises(error, match=message):
            DenseKVCache.empty(1, 1, 4, 8, k_channels=channels)
