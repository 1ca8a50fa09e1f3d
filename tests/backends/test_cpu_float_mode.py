"""The floating-point modes of threads don't change the results of the CPU kernels."""

import pytest
import torch

from gqa_kernels import DenseKVCache, HeadMap, asym_gqa_attention, asym_gqa_decode
from gqa_kernels.cache.formats import FORMAT_OF_NAME
from gqa_kernels.testing import assert_decode_close
from tests.backends.test_cpu import isa, pytestmark, threads  # noqa: F401 (fixtures)

MAP = HeadMap([0, 1, 0, 1])
# The smallest values of a format are subnormal there, or in fp32 on the way to their own.
SIZES = {"fp8_e4m3": 0.004, "fp8_e5m2": 1e-5, torch.float16: 1e-6, torch.float32: 1e-40}
STORED = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.fixture
def flushed():
    """Calls a function while this thread flushes subnormal numbers to zero."""

    def call(function, *args, **options):
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor can't flush subnormal numbers")
        try:
            result = function(*args, **options)
            tiny = torch.tensor(2.0**-126)
            assert tiny * 0.5 == 0, "the caller's mode was not restored"
            return result
        finally:
            torch.set_flush_denormal(False)

    return call


def assert_same_bits(found, expected):
    for x, y in zip(found, expected, strict=True):
        integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]
        assert torch.equal(x.view(integers), y.view(integers))


@pytest.mark.parametrize("subnormals", ["cheap", "costly"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("format", SIZES, ids=str)
@pytest.mark.parametrize("q_len, length", [(1, 300), (1, 5000), (30, 300)])
def test_small_numbers_in_caches(
    isa,  # noqa: F811
    threads,  # noqa: F811
    flushed,
    monkeypatch,
    q_len,
    length,
    format,
    count,
    subnormals,
):
    monkeypatch.setenv("GQA_KERNELS_CPU_SUBNORMALS", subnormals)
    threads(count)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, length, 64, generator=generator)
    stored = STORED.get(format, format)
    dtype = torch.float32 if format in STORED else format
    scales = {"k_scale": 1.0, "v_scale": 1.0} if format in STORED else {}
    lengths = torch.tensor([length])
    cache = DenseKVCache(k.to(stored), (v * SIZES[format]).to(stored), lengths, **scales)
    q = torch.randn(1, 4, q_len, 64, generator=generator).to(dtype)
    options = {"return_lse": True, "backend": "cpu"}
    out, lse = asym_gqa_decode(q, cache, MAP, **options)
    assert out.any()
    assert_decode_close(out, q, cache, MAP, lse=lse)
    assert_same_bits(flushed(asym_gqa_decode, q, cache, MAP, **options), (out, lse))


@pytest.mark.parametrize("size", [1.0, 1e-38])
@pytest.mark.parametrize("name", [None, *FORMAT_OF_NAME])
def test_appends(isa, flushed, name, size):  # noqa: F811
    """Of small numbers the scales are subnormal, too."""
    tokens = size * torch.randn(2, 2, 2, 50, 64)

    def appended():
        cache = DenseKVCache.empty(2, 2, 60, 64, dtype=torch.float32, format=name)
        cache.append(*tokens, backend="cpu")
        out = asym_gqa_decode(torch.ones(2, 4, 1, 64), cache, MAP, backend="cpu")
        written = [
            x[:, :, :50] for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None
        ]
        return [out, *written]

    expected = appended()
    assert all(x.any() for x in expected[1:])
    assert_same_bits(flushed(appended), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_gradients(isa, flushed, dtype):  # noqa: F811
    q, k, v = (torch.randn(1, heads, 40, 64).to(dtype) for heads in (4, 2, 2))
    dout = (torch.randn(1, 4, 40, 64) * SIZES[dtype]).to(dtype)

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = asym_gqa_attention(*leaves, MAP, causal=True, backend="cpu")
        return torch.autograd.grad(out, leaves, dout)

    expected = gradients()
    assert all(x.any() for x in expected)
    assert_same_bits(flushed(gradients), expected)
