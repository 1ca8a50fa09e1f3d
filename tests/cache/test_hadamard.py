"""Caches with rotated keys: the same attention, and less error where keys have 4 bits."""

import pytest
import torch

from gqa_kernels import DenseKVCache, PagedKVCache, asym_gqa_decode, available_backends, plan_decode
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.cache.hadamard import block_size, rotate_by_hadamard
from gqa_kernels.testing import assert_attention_close, assert_decode_close
from tests.cases.attention import UNEVEN

BACKENDS = available_backends()


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
def test_attention_stays_what_it_is(paged, backend, device):
    """By appends with and without a rotary table, packed or not, plans, and writes to slots."""
    batch, dim, lengths = 2, 16, [0, 0]
    sizes = {"dtype": torch.float32, "device": device, "hadamard": True}
    if paged:
        table = torch.tensor([[3, 0, 5, 1], [2, 4, 7, 6]], device=device)
        pool = PagedKVCache.empty(8, 8, 3, dim, **sizes)
        cache = pool.at(table, torch.tensor(lengths, dtype=torch.int32, device=device))
    else:
        cache = DenseKVCache.empty(batch, 3, 32, dim, **sizes)
    plain = DenseKVCache.empty(batch, 3, 32, dim, dtype=torch.float32, device=device)
    assert cache.hadamard and not plain.hadamard
    table = [x.to(device) for x in rotary(40, dim)]
    for tokens, rotates in ((5, True), (1, True), (4, False)):
        q, k, v = (torch.randn(batch, n, tokens, dim, device=device) for n in (6, 3, 3))
        given = dict(zip(("rotary_cos", "rotary_sin"), table, strict=True)) if rotates else {}
        out, expected = (
            asym_gqa_decode(q, x, UNEVEN, k_new=k, v_new=v, backend=backend, **given)
            for x in (cache, plain)
        )
        torch.testing.assert_close(out, expected)
    counts = torch.tensor([0, 2, 3], device=device)
    k, v = torch.randn(2, 3, 3, dim, device=device)
    q = torch.randn(3, 6, dim, device=device)
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
    q = torch.randn(batch, 6, 2, dim, device=device)
    out, lse = plan_decode(q, cache, UNEVEN, backend=backend)(q, cache, return_lse=True)
    assert_decode_close(out, q, cache, UNEVEN, lse=lse)
    assert torch.equal(cache.lengths, plain.lengths)
    if not paged:
        turned, _, _ = gather(cache.view())
        for b, length in enumerate(cache.lengths.tolist()):
            torch.testing.assert_close(
                turned[b, :, :length], rotate_by_hadamard(stored[b, :, :length])
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


def test_less_error_with_four_bits():
    """The LSE's error: scores are where the stored keys go."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 8, 64, generator=generator)
    k, v = outliers(generator, 1, 3, 200, 64), torch.randn(1, 3, 200, 64, generator=generator)
    found = {}
    for name, format, hadamard in (
        ("exact", None, False), ("plain", "int4", False), ("rotated", "int4", True)
    ):  # fmt: skip
        cache = DenseKVCache.empty(
            1, 3, 200, 64, dtype=torch.float32, format=format, hadamard=hadamard
        )
        cache.append(k, v)
        found[name] = asym_gqa_decode(q, cache, UNEVEN, return_lse=True)[1]
    plain, rotated = ((found[name] - found["exact"]).abs().mean() for name in ("plain", "rotated"))
    assert rotated < plain / 2


def test_keep_fork_and_per_head_lengths():
    """What moves keys moves rotated ones; other memory is rotated if its cache says so."""
    cache = DenseKVCache.empty(1, 3, 16, 8, dtype=torch.float32, hadamard=True)
    plain = DenseKVCache.empty(1, 3, 16, 8, dtype=torch.float32)
    k, v = torch.randn(2, 1, 3, 10, 8)
    q = torch.randn(1, 6, 1, 8)
    kept = torch.rand(1, 3, 10) < 0.5
    for x in (cache, plain):
        x.append(k, v)
        x.keep(kept)
    out, expected = (asym_gqa_decode(q, x, UNEVEN) for x in (cache, plain))
    torch.testing.assert_close(out, expected)
    again = DenseKVCache(cache.k, cache.v, cache.lengths, hadamard=True)
    torch.testing.assert_close(asym_gqa_decode(q, again, UNEVEN), expected)
    cos, sin = rotary(20, 8)
    with pytest.raises(NotImplementedError, match="lengths per head and hadamard, pass rotary_pos"):
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
