"""FlopCounterMode counts our ops as it counts SDPA over expanded K and V."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
)
from gqa_kernels.testing import make_inputs
from tests.api.test_attention import USABLE, widest

FUSED = [name for name in USABLE if name != "reference"]  # whose products torch counts itself
MAP = HeadMap([0, 2, 0, 1, 1])
VALUE_DIM = 24  # other than D, so that the products of backward differ


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def inputs(backend, device, batch, q_len, kv_len):
    kind = dict(dtype=widest(backend), device=device)
    return make_inputs(batch, MAP, q_len, kv_len, 16, value_head_dim=VALUE_DIM, **kind)


def counted_sdpa(q, k, v) -> tuple[int, int]:
    """Forward and backward of SDPA over expanded K and V. Torch's functions of shapes say what its
    counter counts for a fused kernel; on the CPU it has only SDPA's matrix products to count."""
    k, v = k[:, MAP.entries], v[:, MAP.entries]
    forward = sdpa_flop_count(q.shape, k.shape, v.shape)
    with sdpa_kernel(SDPBackend.MATH):
        assert flops_of(lambda: scaled_dot_product_attention(q, k, v)) == forward
    out_shape = (*q.shape[:3], v.shape[3])
    return forward, sdpa_backward_flop_count(out_shape, q.shape, k.shape, v.shape)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(backend, return_lse, causal, device):
    q, k, v = inputs(backend, device, 2, 7, 9)
    forward, backward = counted_sdpa(q, k, v)
    options = dict(causal=causal, return_lse=return_lse, backend=backend)
    assert flops_of(lambda: asym_gqa_attention(q, k, v, MAP, **options)) == forward
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    results = asym_gqa_attention(*leaves, MAP, **options)
    out = results[0] if return_lse else results
    assert flops_of(out.sum().backward) == backward


@pytest.mark.parametrize("backend", FUSED)
def test_lengths_per_head_count_their_keys(backend, device):
    q, k, v = inputs(backend, device, 2, 3, 9)
    lengths = torch.tensor([[9, 4, 0], [1, 2, 3]], device=device)
    found = flops_of(lambda: asym_gqa_attention(q, k, v, MAP, kv_lengths=lengths, backend=backend))
    keys = sum(int(lengths[b, h]) for b in range(2) for h in MAP)
    assert found == 2 * 3 * keys * (16 + VALUE_DIM)


@pytest.mark.parametrize("backend", FUSED)
def test_packed(backend, device):
    q, k, v = (x[0].transpose(0, 1) for x in inputs(backend, device, 1, 7, 12))
    bounds_q, bounds_k = [0, 4, 4, 7], [0, 9, 10, 12]
    parts = [
        counted_sdpa(
            *(x[begin:end].transpose(0, 1)[None] for x, (begin, end) in zip(
                (q, k, v), ((a, b), (c, d), (c, d)), strict=True))
        )
        for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)
    ]  # fmt: skip
    offsets = [torch.tensor(x, device=device) for x in (bounds_q, bounds_k)]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        return asym_gqa_varlen_attention(q, k, v, MAP, *offsets, 7, 12, backend=backend)

    assert flops_of(lambda: call(q, k, v)) == sum(forward for forward, _ in parts)
    out = call(*leaves)
    assert flops_of(out.sum().backward) == sum(backward for _, backward in parts)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("format", [None, "int4"])
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_cache(backend, format, kind, device):
    """The keys that are there count, not the capacity; an int4 cache counts its numbers."""
    q, k, v = inputs(backend, device, 2, 3, 5)
    options = dict(value_head_dim=VALUE_DIM, dtype=q.dtype, device=device, format=format)
    if kind == "dense":
        cache = DenseKVCache.empty(2, 3, 32, 16, **options)
    else:
        pool = PagedKVCache.empty(8, 8, 3, 16, **options)
        table = torch.arange(8, device=device).view(2, 4)
        cache = pool.at(table, torch.zeros(2, dtype=torch.int32, device=device))
    cache.append(k, v, backend=backend)
    expected, _ = counted_sdpa(q, k, v)
    assert flops_of(lambda: asym_gqa_decode(q, cache, MAP, backend=backend)) == expected


@pytest.mark.parametrize("backend", FUSED)
def test_tensors_without_values_count_the_most_there_can_be(backend):
    q, k, v = inputs(backend, "cpu", 2, 1, 9)
    expected, _ = counted_sdpa(q, k, v)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        lengths = mode.from_tensor(torch.tensor([1, 2], dtype=torch.int32))
        cache = DenseKVCache(*fakes[1:], lengths)
        assert flops_of(lambda: asym_gqa_decode(fakes[0], cache, MAP, backend=backend)) == expected


def test_counter_made_before_the_first_call_of_a_process():
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
import gqa_kernels
q = torch.randn(1, 2, 3, 8)
counter = FlopCounterMode(display=False)
with counter:
    gqa_kernels.asym_gqa_attention(q, q[:, :1], q[:, :1], [0, 0], backend="cpu")
assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 3 * 8, counter.get_total_flops()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
