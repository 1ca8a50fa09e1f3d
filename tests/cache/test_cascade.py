"""Merging of attention states: any cut of the keys, and prefixes that sequences share."""

import math
from itertools import pairwise

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    merge_attention_states,
    shared_prefix_attention,
)
from gqa_kernels.testing import assert_attention_close
from tests.api.test_attention import widest
from tests.cache.test_decode import USABLE, queries
from tests.cases.attention import UNEVEN


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "triton"])
@pytest.mark.parametrize("parts", [2, 7, 61])
def test_a_long_sequence_in_any_number_of_parts(backend, parts, device):
    """100k tokens, each part through its own begin and length of one cache."""
    n, head_map = 100_000, HeadMap([0, 1, 1])
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (1, 2, n, 16), widest(backend)
    k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    q = queries(1, head_map, 1, 16, dtype, device)
    cut = [round(n * (i / parts) ** 2) for i in range(parts + 1)]  # uneven parts
    merged = None
    for begin, end in pairwise(cut):
        cache = DenseKVCache(
            k, v, torch.tensor([end - begin], device=device),
            begin=torch.tensor([begin], device=device),
        )  # fmt: skip
        part = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
        merged = part if merged is None else merge_attention_states(*merged, *part)
    assert_attention_close(merged[0], q, k, v, head_map, lse=merged[1])


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
def test_merge_is_attention_over_the_union(layout):
    q, k, v = (torch.randn(2, heads, 9, 16, dtype=torch.float64) for heads in (6, 3, 3))
    visible = torch.rand(9, 9) > 0.5
    visible[4] = False  # a row that sees nothing in one part, and one that sees nothing at all
    expected, expected_lse = asym_gqa_attention(q, k, v, UNEVEN, return_lse=True,
                                                attn_mask=visible)  # fmt: skip
    states = []
    for part in (slice(0, 3), slice(3, 9)):
        mask = torch.zeros_like(visible)
        mask[:, part] = visible[:, part]
        out, lse = asym_gqa_attention(q, k, v, UNEVEN, return_lse=True, attn_mask=mask)
        if layout == "bshd":
            out = out.transpose(1, 2)
        if layout == "packed":
            out, lse = out[0].transpose(0, 1), lse[0]
        states += [out, lse]
    out, lse = merge_attention_states(*states, layout="bshd" if layout == "bshd" else "bhsd")
    if layout == "bshd":
        out = out.transpose(1, 2)
    if layout == "packed":
        out, expected, expected_lse = out.transpose(0, 1), expected[0], expected_lse[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert (lse[..., 4] == -math.inf).all()


def test_merge_has_gradients():
    def state(seed, empty):
        generator = torch.Generator().manual_seed(seed)
        out = torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)
        lse = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
        lse[..., empty] = -math.inf
        return out.requires_grad_(), lse.requires_grad_()

    (out_a, lse_a), (out_b, lse_b) = state(0, []), state(1, [2])
    for lse in (lse_a, lse_b):
        out, merged = merge_attention_states(out_a, lse_a, out_b, lse_b)
        grads = torch.autograd.grad(out.sum() + merged.sum(), (out_a, out_b, lse))
        assert all(x.isfinite().all() for x in grads)
    finite = [x.detach()[:, :, :2].clone().requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    assert torch.autograd.gradcheck(merge_attention_states, finite)
    nothing = torch.full_like(lse_a, -math.inf, requires_grad=True)
    out, lse = merge_attention_states(out_a, nothing, out_b, nothing)
    assert (out == 0).all() and (lse == -math.inf).all()
    (gradient,) = torch.autograd.grad(out.sum(), nothing)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("empty", [-math.inf, math.inf])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "packed"])
def test_merge_ignores_rows_without_weight(empty, garbage, dtype, layout):
    """Rows 0 and 1 are empty in one part each, row 2 in both: FlashAttention-2's have LSE +inf."""
    shape = {"bhsd": (2, 3, 4, 8), "bshd": (2, 4, 3, 8), "packed": (4, 3, 8)}[layout]
    out_a, out_b = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    lse_a, lse_b = (torch.randn((3, 4) if layout == "packed" else (2, 3, 4)) for _ in range(2))
    lse_a[..., [0, 2]] = lse_b[..., [1, 2]] = empty
    axis = {"bhsd": 2, "bshd": 1, "packed": 0}[layout]
    with torch.no_grad():
        out_a.index_fill_(axis, torch.tensor([0, 2]), garbage)
        out_b.index_fill_(axis, torch.tensor([1, 2]), garbage)
    lse_a, lse_b = lse_a.requires_grad_(), lse_b.requires_grad_()
    out, lse = merge_attention_states(
        out_a, lse_a, out_b, lse_b, layout="bshd" if layout == "bshd" else "bhsd"
    )
    assert out.dtype == dtype and out.isfinite().all()
    row = [x.unbind(axis) for x in (out, out_a, out_b)]
    torch.testing.assert_close(row[0][0], row[2][0])
    torch.testing.assert_close(row[0][1], row[1][1])
    assert not row[0][2].any() and (lse[..., 2] == -math.inf).all()
    torch.testing.assert_close(lse[..., 0], lse_b[..., 0])
    torch.testing.assert_close(lse[..., 1], lse_a[..., 1])
    gradients = torch.autograd.grad(
        out.float().square().sum() + lse[..., [0, 1, 3]].sum(), (out_a, lse_a, out_b, lse_b)
    )
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("q_len, layout", [(1, "bhsd"), (3, "bshd")])
def test_shared_prefix(backend, q_len, layout, device):
    prefix_len, suffixes = 21, [4, 9, 3]
    generator = torch.Generator().manual_seed(1)
    shape, dtype = (3, 3, 30, 16), widest(backend)
    k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    for x in (k, v):
        x[:, :, :prefix_len] = x[:1, :, :prefix_len]
    prefix = DenseKVCache(k[:1], v[:1], torch.tensor([prefix_len], device=device))
    pages = [x[:, :, prefix_len:].reshape(3, 3, 3, 3, 16).transpose(1, 2).flatten(0, 1)
             for x in (k, v)]  # fmt: skip
    table = torch.arange(9, device=device).view(3, 3)
    suffix = PagedKVCache(*pages, table, torch.tensor(suffixes, device=device))
    q = queries(3, UNEVEN, q_len, 16, dtype, device)
    sinks = torch.linspace(-2, 4, 6, device=device)
    args = (q, k, v) if layout == "bhsd" else (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = args
    out, lse = shared_prefix_attention(
        q, prefix, suffix, UNEVEN, sinks=sinks, layout=layout, return_lse=True, backend=backend
    )
    lengths = torch.tensor([prefix_len + n for n in suffixes], device=device)
    assert_attention_close(
        out, q, k, v, UNEVEN, lse=lse, causal=True, kv_lengths=lengths, sinks=sinks, layout=layout
    )


@pytest.mark.parametrize("wrong, error, match", [
    ({"lse_b": 0.5}, TypeError, "lse_b must be a torch.Tensor, got float"),
    ({"lse_a": torch.zeros(1, 2, 3, dtype=torch.uint8)}, TypeError, "lse_a must be a dense tensor"),
    ({"out_a": torch.zeros(1, 2, 3, 4).to_sparse()}, TypeError, "out_a must be a dense tensor"),
    ({"out_b": torch.zeros(2, 3, 4)}, ValueError, "out_b must have out_a's shape"),
    ({"out_b": torch.zeros(1, 2, 3, 4, device="meta")}, ValueError, "device of out_a"),
    ({"lse_a": torch.zeros(2), "lse_b": torch.zeros(2)}, ValueError, "lse_a 3, or 3 and 2"),
    ({"layout": "sbhd"}, ValueError, "layout must be one of"),
])  # fmt: skip
def test_merge_checks_its_states(wrong, error, match):
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    states = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    with pytest.raises(error, match=match):
        merge_attention_states(**states | wrong)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_shared_prefix_without_queries(layout):
    prefix, suffix = (DenseKVCache.empty(n, 3, 8, 16, dtype=torch.float32) for n in (1, 2))
    q = torch.zeros(2, 0, 6, 16) if layout == "bshd" else torch.zeros(2, 6, 0, 16)
    out = shared_prefix_attention(q, prefix, suffix, UNEVEN, layout=layout, backend="reference")
    assert out.shape == q.shape


@pytest.mark.parametrize("name", ["prefix", "suffix"])
def test_shared_prefix_checks_its_caches(name):
    cache = DenseKVCache.empty(1, 3, 8, 16, dtype=torch.float32)
    caches = {"prefix": cache, "suffix": cache, name: None}
    with pytest.raises(TypeError, match=f"{name} must be a DenseKVCache or PagedKVCache, got None"):
        shared_prefix_attention(torch.zeros(1, 6, 1, 16), head_map=UNEVEN, **caches)


@pytest.mark.parametrize("wrong, error, match", [
    ({"sinks": "cpu"}, TypeError, "sinks must be a torch.Tensor or None, got str"),
    ({"sinks": torch.zeros(5)}, ValueError, r"sinks must have shape \(6,\), got \(5,\)"),
    ({"return_lse": torch.zeros(0)}, TypeError, "return_lse must be True or False"),
])  # fmt: skip
def test_shared_prefix_checks_its_options(wrong, error, match):
    cache = DenseKVCache.empty(1, 3, 8, 16, dtype=torch.float32)
    with pytest.raises(error, match=match):
        shared_prefix_attention(torch.zeros(1, 6, 1, 16), cache, cache, UNEVEN, **wrong)
