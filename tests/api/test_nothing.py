"""Calls without sequences, queries or keys, and tensors without values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_kernels import (
    DenseKVCache,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
)

MAP = [0, 1, 0, 1]
BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_lengths, k_lengths", [([], []), ([0, 0], [3, 0]), ([2, 0], [0, 0])])
def test_packed_sequences_of_nothing_have_gradients(q_lengths, k_lengths, backend):
    q = torch.randn(sum(q_lengths), 4, 16, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 2, 16, requires_grad=True) for _ in range(2))
    offsets = [
        torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
        for lengths in (q_lengths, k_lengths)
    ]
    most = max(q_lengths, default=0), max(k_lengths, default=0)
    out = asym_gqa_varlen_attention(q, k, v, MAP, *offsets, *most, backend=backend)
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape and not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, q_len", [(0, 1), (2, 0)])
def test_decode_of_nothing(batch, q_len, backend):
    k = torch.randn(batch, 2, 8, 16)
    cache = DenseKVCache(k, k, torch.full((batch,), 3))
    q = torch.randn(batch, 4, q_len, 16)
    assert asym_gqa_decode(q, cache, MAP, backend=backend).shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors_may_have_any_strides(backend):
    q = torch.randn(1, 4, 16, 0).transpose(2, 3)  # no queries, last stride 0 or more
    k = torch.randn(1, 2, 5, 16)
    assert asym_gqa_attention(q, k, k, MAP, backend=backend).shape == (1, 4, 0, 16)
    cache = DenseKVCache(k, k, torch.tensor([5]))
    assert asym_gqa_decode(q, cache, MAP, backend=backend).shape == (1, 4, 0, 16)
    packed = torch.randn(4, 16, 0).permute(2, 0, 1)
    offsets = torch.tensor([0, 0]), torch.tensor([0, 5])
    rows = k[0].transpose(0, 1)
    out = asym_gqa_varlen_attention(packed, rows, rows, MAP, *offsets, 0, 5, backend=backend)
    assert out.shape == (0, 4, 16)


def packed_call(x):
    offsets = x(torch.tensor([0, 3, 5], dtype=torch.int32))
    q, k = x(torch.randn(5, 4, 16)), x(torch.randn(5, 2, 16))
    return asym_gqa_varlen_attention(q, k, k, MAP, offsets, offsets, 3, 3).shape, q.shape


def decode_call(x):
    k = x(torch.randn(2, 2, 8, 16))
    cache = DenseKVCache(k, k, x(torch.tensor([3, 4], dtype=torch.int32)))
    q, new = x(torch.randn(2, 4, 1, 16)), x(torch.randn(2, 2, 1, 16))
    return asym_gqa_decode(q, cache, MAP, k_new=new, v_new=new).shape, q.shape


def paged_call(x):
    pool = x(torch.randn(6, 2, 4, 16))
    table = x(torch.arange(6, dtype=torch.int32).view(2, 3))
    cache = PagedKVCache(pool, pool, table, x(torch.tensor([3, 4], dtype=torch.int32)))
    cache.append(x(torch.randn(2, 2, 1, 16)), x(torch.randn(2, 2, 1, 16)))
    q = x(torch.randn(2, 4, 1, 16))
    return asym_gqa_decode(q, cache, MAP).shape, q.shape


@pytest.mark.parametrize("call", [packed_call, decode_call, paged_call])
def test_fake_tensors(call):
    with FakeTensorMode() as mode:
        found, expected = call(mode.from_tensor)
    assert found == expected


@pytest.mark.parametrize("call", [packed_call, decode_call, paged_call])
def test_meta_tensors(call):
    found, expected = call(lambda x: x.to("meta"))
    assert found == expected
