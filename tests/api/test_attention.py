"""Every backend on every case it declares it can run, by the tolerance rule."""

import pytest
import torch

from gqa_kernels import asym_gqa_attention, available_backends
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import assert_attention_close, assert_close, make_inputs
from tests.cases.attention import CASES, DECODE_CASES, PREFILL_CASES, UNEVEN, matrix, racing
from tests.conftest import DEVICE
from tests.dense import dense_attention

USABLE = [name for name in available_backends() if DEVICE in BACKENDS[name].capabilities.devices]


def widest(backend: str) -> torch.dtype:
    """float32, or what the backend has in its place."""
    dtypes = BACKENDS[backend].capabilities.dtypes
    return torch.float32 if torch.float32 in dtypes else torch.float16


@pytest.mark.parametrize("case, backend, dtype", matrix(USABLE))
def test_matches_reference(case, backend, dtype, device):
    args, options = case.build(dtype, device)
    before = [x.clone() for x in args[:3]]
    out, lse = asym_gqa_attention(*args, **options, return_lse=True, backend=backend)
    assert_attention_close(out, *args, lse=lse, **options)
    for x, y in zip(args, before, strict=False):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)  # inputs untouched


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference_matches_loops(case):
    """The reference against four nested loops that share no code with it."""
    args, options = case.build(torch.float64, "cpu")
    out, lse = asym_gqa_attention(*args, **options, return_lse=True, backend="reference")
    expected_out, expected_lse = dense_attention(*args, **options)
    torch.testing.assert_close(out, torch.from_numpy(expected_out), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, torch.from_numpy(expected_lse), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("case", [PREFILL_CASES[1], DECODE_CASES[1]], ids=lambda case: case.id)
def test_layouts_agree(case, backend, device):
    """bshd gives the transpose of bhsd, bit for bit, and memory in its own order."""
    (q, k, v, head_map), options = case.build(widest(backend), device)
    expected = asym_gqa_attention(q, k, v, head_map, **options, backend=backend)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = asym_gqa_attention(q, k, v, head_map, **options, layout="bshd", backend=backend)
    assert out.is_contiguous() and expected.is_contiguous()
    assert torch.equal(out.transpose(1, 2), expected)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("q_len", [1, 40])
def test_garbage_beyond_lengths_is_never_used(backend, q_len, device):
    case = next(c for c in PREFILL_CASES if c.id == "lengths")
    (q, k, v, head_map), options = case.build(widest(backend), device)
    q = q[:, :, :q_len]
    clean = asym_gqa_attention(q, k, v, head_map, **options, backend=backend)
    for b, n in enumerate(options["kv_lengths"].tolist()):
        k[b, :, n:] = torch.nan
        v[b, :, n:] = torch.inf
    dirty = asym_gqa_attention(q, k, v, head_map, **options, backend=backend)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("q_len", [1, 40])
def test_large_scores_neither_overflow_nor_vanish(backend, q_len, device):
    case = PREFILL_CASES[0]
    (q, k, v, head_map), _ = case.build(widest(backend), device)
    q = (q * 300)[:, :, :q_len]  # within float16
    for shift in (-1e4, 0.0, 1e4):
        mask = torch.full((q.shape[2], k.shape[2]), shift, device=device)
        args = (q, k, v, head_map)
        out, lse = asym_gqa_attention(*args, attn_mask=mask, return_lse=True, backend=backend)
        assert_attention_close(out, *args, lse=lse, attn_mask=mask)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("q_len", [1, 40])
def test_windows_beyond_any_length(backend, q_len, device):
    (q, k, v, head_map), _ = PREFILL_CASES[0].build(widest(backend), device)
    q = q[:, :, :q_len]
    expected = asym_gqa_attention(q, k, v, head_map, causal=True, backend=backend)
    for left in (2**31 - 1, 2**31, 2**62):
        out = asym_gqa_attention(
            q, k, v, head_map, causal=True, window=(left, left), backend=backend
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", racing(USABLE))
@pytest.mark.parametrize("q_len, kv_len", [(1, 700), (60, 60)])
def test_deterministic(backend, q_len, kv_len, device):
    q, k, v = make_inputs(2, UNEVEN, q_len, kv_len, 16, dtype=widest(backend), device=device)
    first = asym_gqa_attention(q, k, v, UNEVEN, deterministic=True, backend=backend)
    for _ in range(3):
        again = asym_gqa_attention(q, k, v, UNEVEN, deterministic=True, backend=backend)
        assert torch.equal(first, again)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("shape", ["batch", "queries"])
def test_nothing_to_do(backend, shape, device):
    case = PREFILL_CASES[0]
    (q, k, v, head_map), _ = case.build(widest(backend), device)
    if shape == "batch":
        q, k, v = q[:0], k[:0], v[:0]
    else:
        q = q[:, :, :0]
    out, lse = asym_gqa_attention(q, k, v, head_map, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_tolerance_rule_catches_a_wrong_map():
    """The rule itself must fail where one head reads another KV head."""
    case = PREFILL_CASES[0]
    (q, k, v, head_map), _ = case.build(torch.bfloat16, "cpu")
    out = asym_gqa_attention(q, k, v, [0, 0, 0, 1, 2, 1], backend="reference")
    with pytest.raises(AssertionError, match="out: error"):
        assert_attention_close(out, q, k, v, head_map)


def test_tolerance_rule_catches_stray_and_missing_nonfinite():
    exact = torch.tensor([1.0, -torch.inf, torch.nan], dtype=torch.float64)
    right = exact.float()
    assert_close("x", right, exact, [right])
    for wrong in ([torch.nan, -torch.inf, torch.nan], [1.0, 5.0, torch.nan],
                  [1.0, torch.inf, torch.nan], [1.0, -torch.inf, -torch.inf]):  # fmt: skip
        with pytest.raises(AssertionError, match="non-finite"):
            assert_close("x", torch.tensor(wrong), exact, [right])


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lowest_mask_values_hide_a_row(backend, q_len, mask_dtype, device):
    """A row of values below half of fp32's lowest number sees nothing; other rows see all keys."""
    dtype = widest(backend)
    q, k, v = make_inputs(1, UNEVEN, q_len, 9, 16, dtype=dtype, device=device)
    half = torch.tensor(torch.finfo(torch.float32).min / 2, dtype=torch.float32)
    below = torch.nextafter(half, 2 * half) if mask_dtype != torch.bfloat16 else 1.01 * half
    values = [
        (below, True),
        (2 * half, True),
        (-torch.inf * half.abs(), True),
        (half / half, False),
    ]
    if backend != "triton":  # at such magnitudes rounding leaves nothing of its row sum
        values.append((0.99 * half, False))  # rounded to bf16, half itself is below half
    for value, hides in values:
        mask = torch.zeros(q_len, 9, dtype=mask_dtype, device=device)
        mask[0] = value.to(mask_dtype)
        out, lse = asym_gqa_attention(
            q, k, v, UNEVEN, attn_mask=mask, return_lse=True, backend=backend,
        )  # fmt: skip
        assert (lse[:, :, 0] == -torch.inf).all() == hides
        assert (not out[:, :, 0].any()) == hides
        assert out.isfinite().all() and lse[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("backend", USABLE)
def test_masks_of_the_lowest_number_have_no_gradient(backend, device):
    q, k, v = make_inputs(1, UNEVEN, 5, 9, 16, dtype=widest(backend), device=device)
    mask = torch.zeros(5, 9, device=device)
    mask[1], mask[2, 4:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min

    def gradients(mask):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse = asym_gqa_attention(
            *leaves, UNEVEN, attn_mask=mask, return_lse=True, backend=backend
        )
        finite = lse.masked_fill(lse == -torch.inf, 0)
        return torch.autograd.grad(out.square().sum() + finite.sum().to(out.dtype), leaves)

    for x, y in zip(gradients(mask), gradients(mask == 0), strict=True):
        torch.testing.assert_close(x, y)
        assert not gradients(mask)[0][:, :, 1].any()


EMPTY = {"no batch": (0, 4, 5), "no queries": (2, 0, 5), "no keys": (2, 4, 0), "nothing": (0, 0, 0)}


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("batch, q_len, kv_len", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_nothing_has_gradients(backend, batch, q_len, kv_len, layout, last_stride, device):
    """Also for a sum, whose gradient is one expanded number, and for any strides."""

    def empty(heads, tokens, columns):
        shape = (batch, heads, tokens) if layout == "bhsd" else (batch, tokens, heads)
        x = torch.randn(*shape, columns * last_stride, device=device, dtype=widest(backend))
        # A tensor with elements must be contiguous in its last dim.
        x = x[..., ::last_stride] if x.numel() == 0 else x[..., :columns]
        return x.requires_grad_()

    q, k, v = empty(6, q_len, 16), empty(3, kv_len, 16), empty(3, kv_len, 24)
    slopes = torch.rand(6, device=device, requires_grad=True)
    sinks = torch.rand(6, device=device, requires_grad=True)
    out, lse = asym_gqa_attention(
        q, k, v, UNEVEN, alibi_slopes=slopes, sinks=sinks, causal=True, layout=layout,
        return_lse=True, backend=backend,
    )  # fmt: skip
    assert out.shape == (*q.shape[:3], 24)
    for loss in (out.sum(), lse.sum()):
        leaves = (q, k, v, slopes, sinks)
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for x, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                assert gradient.shape == x.shape and not gradient.any()
