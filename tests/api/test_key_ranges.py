"""``key_ranges`` over caches and packed sequences, their gradients, errors, and the work that they
save. ``tests/cases/attention.py`` has the dense calls."""

import statistics
import time

import pytest
import torch

from gqa_kernels import (
    AuxRequest,
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    explain_backend,
    plan_decode,
)
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import (
    assert_attention_close,
    assert_auxiliary_close,
    assert_decode_close,
    assert_gradients_close,
)
from tests.api.test_attention import USABLE

MAP = HeadMap([0, 1, 1, 0, 1])
RANGED = [name for name in USABLE if "key_ranges" in BACKENDS[name].capabilities.options]
QUERIES, KEYS = [3, 40, 0, 1], [70, 53, 9, 200]


def tensors(q_len, kv_len, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, tokens, 16, generator=generator).to(dtype)
        for heads, tokens in ((5, q_len), (2, kv_len), (2, kv_len))
    ]


def ranges(batch, heads, q_len, kv_len):
    generator = torch.Generator().manual_seed(1)
    ends = torch.randint(-5, kv_len + 5, (batch, heads, q_len, 2), generator=generator)
    return ends.sort(-1).values.int()


def as_mask(key_ranges, kv_len):
    j = torch.arange(kv_len)
    return (key_ranges[..., :1] <= j) & (j < key_ranges[..., 1:])


def offsets(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int()


def part(x, b, counts):
    """Sequence ``b`` of packed ``[total, H, D]`` as ``[1, H, n, D]``."""
    first = sum(counts[:b])
    return x[first : first + counts[b]].transpose(0, 1)[None]


@pytest.mark.parametrize("format", [None, "int8", "fp8_e4m3"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("q_len", [1, 7, 40])
@pytest.mark.parametrize("backend", RANGED)
def test_over_caches(backend, q_len, page_size, format):
    q, k, v = tensors(q_len, 100)
    if page_size is None:
        cache = DenseKVCache.empty(2, 2, 128, 16, dtype=q.dtype, format=format)
    else:
        pool = PagedKVCache.empty(16, page_size, 2, 16, dtype=q.dtype, format=format)
        table = torch.randperm(16, generator=torch.Generator().manual_seed(2)).view(2, 8).int()
        cache = pool.at(table, torch.zeros(2, dtype=torch.int32))
    cache.append(k, v)
    for heads in (1, 5):
        options = {"key_ranges": ranges(2, heads, q_len, 100), "causal": heads == 1}
        out, lse = asym_gqa_decode(q, cache, MAP, return_lse=True, backend=backend, **options)
        assert_decode_close(out, q, cache, MAP, lse=lse, **options)
        plan = plan_decode(q, cache, MAP, backend=backend, **options)
        assert torch.equal(plan(q, cache), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", RANGED)
def test_of_packed_sequences(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(counts), heads, 16, generator=generator).to(dtype)
        for counts, heads in ((QUERIES, 5), (KEYS, 2), (KEYS, 2))
    )
    key_ranges = ranges(4, 5, 40, 60)
    arguments = (MAP, offsets(QUERIES), offsets(KEYS), 40, 200)
    x = [x.requires_grad_() for x in (q, k, v)]
    out = asym_gqa_varlen_attention(
        *x, *arguments, key_ranges=key_ranges, causal=True, backend=backend
    )
    dout = torch.randn(out.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(out, x, dout)
    for b, n in enumerate(QUERIES):
        if n == 0:
            continue
        own = {"key_ranges": key_ranges[b : b + 1, :, :n], "causal": True}
        counts = (QUERIES, KEYS, KEYS)
        dense = [part(y.detach(), b, rows) for y, rows in zip(x, counts, strict=True)]
        assert_attention_close(part(out.detach(), b, QUERIES), *dense, MAP, **own)
        found = {
            name: part(grad, b, rows) for name, grad, rows in zip("qkv", grads, counts, strict=True)
        }
        assert_gradients_close(found, *dense, MAP, dout=part(dout, b, QUERIES), **own)


@pytest.mark.parametrize("backend", RANGED)
def test_a_sequence_by_itself_may_be_causal(backend):
    """A causal flag for each sequence, expressed as key ranges."""
    q, k, v = tensors(20, 33)
    causal = torch.tensor([True, False])
    last = torch.arange(20) + 33 - 20
    end = torch.where(causal[:, None], last + 1, 33)
    key_ranges = torch.stack([torch.zeros_like(end), end], -1)[:, None]
    out = asym_gqa_attention(q, k, v, MAP, key_ranges=key_ranges, backend=backend)
    for b in range(2):
        assert_attention_close(
            out[b : b + 1], *(x[b : b + 1] for x in (q, k, v)), MAP, causal=bool(causal[b])
        )


@pytest.mark.parametrize("backend", RANGED)
def test_batch_invariant_results_are_those_of_the_mask(backend):
    q, k, v = tensors(50, 300)
    key_ranges = ranges(2, 5, 50, 300)
    results = [
        asym_gqa_attention(q, k, v, MAP, batch_invariant=True, backend=backend, **hidden)
        for hidden in ({"key_ranges": key_ranges}, {"attn_mask": as_mask(key_ranges, 300)})
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", RANGED)
def test_auxiliary_outputs(backend):
    q, k, v = tensors(20, 90)
    options = {"key_ranges": ranges(2, 5, 20, 90)}
    request = AuxRequest(lse=True, max_scores=True, key_scores=3)
    _, aux = asym_gqa_attention(q, k, v, MAP, return_aux=request, backend=backend, **options)
    assert_auxiliary_close(aux, attention_call(q, k, v, MAP, **options), 3)
    hidden = ~as_mask(options["key_ranges"], 90)[:, :, -3:].any(2)  # [B, Hq, Sk]
    for g, group in enumerate(MAP.groups):
        assert not aux.key_scores[:, g][hidden[:, list(group)].all(1)].any()


def test_types_and_layouts_of_ranges():
    q, k, v = tensors(6, 30)
    key_ranges = ranges(2, 1, 6, 30)
    expected = asym_gqa_attention(q, k, v, MAP, key_ranges=key_ranges)
    beyond = key_ranges.long()
    beyond[..., 1] = torch.where(beyond[..., 1] >= 30, 1 << 40, beyond[..., 1])
    strided = key_ranges.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (beyond, strided, key_ranges.expand(2, 5, 6, 2)):
        assert torch.equal(asym_gqa_attention(q, k, v, MAP, key_ranges=same), expected)


def test_malformed_ranges_are_refused():
    q, k, v = tensors(6, 30)
    good = ranges(2, 1, 6, 30)
    for bad, error, message in (
        (good.float(), TypeError, r"key_ranges\.dtype must be int32 or int64, got torch\.float32"),
        (good[:, :, :5], ValueError, r"key_ranges must have shape \(2, 1 or 5, 6, 2\), got"),
        (good[0], ValueError, r"key_ranges must have shape \(2, 1 or 5, 6, 2\), got"),
        ([0, 1], TypeError, r"key_ranges must be a torch\.Tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            asym_gqa_attention(q, k, v, MAP, key_ranges=bad)


def test_backends_without_ranges_say_so():
    q, k, v = tensors(6, 30)
    reasons = explain_backend(asym_gqa_attention, q, k, v, MAP, key_ranges=ranges(2, 1, 6, 30))
    for name, backend in BACKENDS.items():
        refused = "option key_ranges is not supported" in reasons[name]
        assert refused != ("key_ranges" in backend.capabilities.options)


@pytest.mark.skipif("cpu" not in USABLE, reason="no CPU kernels")
def test_the_cpu_backend_skips_what_ranges_hide():
    """16 documents, each query sees its own: a sixteenth of the keys, and well under half the
    time."""
    q, k, v = tensors(2048, 2048, batch=1)
    first = torch.arange(2048) // 128 * 128
    documents = torch.stack([first, first + 128], -1)[None, None]

    def seconds(**options):
        start = time.perf_counter()
        asym_gqa_attention(q, k, v, MAP, backend="cpu", **options)
        return time.perf_counter() - start

    pairs = [(seconds(key_ranges=documents), seconds()) for _ in range(9)]
    assert statistics.median(ranged / whole for ranged, whole in pairs) < 0.5
