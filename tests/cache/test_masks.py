"""Masks of packed sequences, and masks over a cache that has room for more keys."""

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    explain_backend,
)
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import assert_attention_close, assert_gradients_close
from tests.api.test_attention import USABLE

MAP = HeadMap([0, 1, 1, 0, 1])
PACKED = [name for name in USABLE if "varlen_mask" in BACKENDS[name].capabilities.options]
QUERIES, KEYS = [3, 40, 0, 1], [70, 53, 9, 200]


def offsets(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int()


def packed(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(sum(counts), heads, 16, generator=generator).to(dtype)
        for counts, heads in ((QUERIES, 5), (KEYS, 2), (KEYS, 2))
    )


def masks(dtype):
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(4, 5, 40, 200, generator=generator)
    return {
        "bool": whole > 0,
        "per sequence": whole[:, :1, :1] > -1,
        "additive": (whole * (torch.arange(200) < 180)).to(dtype),
        "blocks": ((torch.arange(200) // 40 + torch.arange(40)[:, None] // 8) % 2 == 0)[None, None],
    }


def part(x, b, counts):
    """Sequence ``b`` of packed ``[total, H, D]`` as ``[1, H, n, D]``."""
    first = sum(counts[:b])
    return x[first : first + counts[b]].transpose(0, 1)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", PACKED)
def test_masks_of_packed_sequences(backend, dtype):
    q, k, v = packed(dtype)
    for name, mask in masks(dtype).items():
        out = asym_gqa_varlen_attention(
            q, k, v, MAP, offsets(QUERIES), offsets(KEYS), 40, 200, attn_mask=mask, causal=True,
            backend=backend,
        )  # fmt: skip
        for b, (n, keys) in enumerate(zip(QUERIES, KEYS, strict=True)):
            if n == 0:
                continue
            own = mask.expand(4, -1, 40, 200)[b : b + 1, :, :n, :keys]
            dense = (part(q, b, QUERIES), part(k, b, KEYS), part(v, b, KEYS))
            try:
                assert_attention_close(
                    part(out, b, QUERIES), *dense, MAP, attn_mask=own, causal=True
                )
            except AssertionError as error:
                raise AssertionError(f"{name}, sequence {b}: {error}") from error


@pytest.mark.parametrize("backend", [name for name in PACKED if name != "reference"])
def test_gradients_through_masks_of_packed_sequences(backend):
    x = [x.requires_grad_() for x in packed()]
    counts = (QUERIES, KEYS, KEYS)
    for mask in masks(torch.float32).values():
        out = asym_gqa_varlen_attention(
            *x, MAP, offsets(QUERIES), offsets(KEYS), 40, 200, attn_mask=mask, backend=backend
        )
        dout = torch.randn(out.shape)
        grads = torch.autograd.grad(out, x, dout)
        for b, (n, keys) in enumerate(zip(QUERIES, KEYS, strict=True)):
            if n == 0:
                continue
            own = mask.expand(4, -1, 40, 200)[b : b + 1, :, :n, :keys]
            found = {
                name: part(grad, b, rows)
                for name, grad, rows in zip("qkv", grads, counts, strict=True)
            }
            dense = [part(y.detach(), b, rows) for y, rows in zip(x, counts, strict=True)]
            assert_gradients_close(found, *dense, MAP, dout=part(dout, b, QUERIES), attn_mask=own)


def test_backends_without_masks_of_packed_sequences_say_so():
    q, k, v = packed()
    arguments = (q, k, v, MAP, offsets(QUERIES), offsets(KEYS), 40, 200)
    reasons = explain_backend(
        asym_gqa_varlen_attention, *arguments, attn_mask=torch.ones(200, dtype=torch.bool)
    )
    for name, backend in BACKENDS.items():
        refused = "option varlen_mask is not supported" in reasons[name]
        assert refused != ("varlen_mask" in backend.capabilities.options)


@pytest.mark.parametrize("backend", PACKED)
def test_packed_queries_over_a_cache(backend):
    k, v = (torch.randn(4, 2, 200, 16) for _ in "kv")
    cache = DenseKVCache(k, v, torch.tensor(KEYS))
    q, _, _ = packed()
    mask = masks(torch.float32)["bool"]
    out = asym_gqa_decode(
        q, cache, MAP, cu_seqlens_q=offsets(QUERIES), attn_mask=mask, backend=backend
    )
    for b, (n, keys) in enumerate(zip(QUERIES, KEYS, strict=True)):
        if n:
            dense = (part(q, b, QUERIES), k[b : b + 1, :, :keys], v[b : b + 1, :, :keys])
            own = mask[b : b + 1, :, :n, :keys]
            assert_attention_close(part(out, b, QUERIES), *dense, MAP, attn_mask=own, causal=True)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_over_a_cache_may_be_as_wide_as_its_keys(backend, additive):
    k, v, q = torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16), torch.randn(2, 5, 3, 16)
    cache = DenseKVCache(k, v, torch.tensor([23, 40]))
    mask = torch.rand(2, 1, 3, 40) > 0.3
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = asym_gqa_decode(q, cache, MAP, attn_mask=mask, backend=backend)
    wide = torch.nn.functional.pad(mask, (0, 20))
    assert torch.equal(out, asym_gqa_decode(q, cache, MAP, attn_mask=wide, backend=backend))
    # Keys beyond the mask are hidden.
    narrow = asym_gqa_decode(q, cache, MAP, attn_mask=mask[..., :30], backend=backend)
    hidden = False if mask.dtype == torch.bool else -torch.inf
    wide = torch.nn.functional.pad(mask[..., :30], (0, 30), value=hidden)
    assert torch.equal(narrow, asym_gqa_decode(q, cache, MAP, attn_mask=wide, backend=backend))
