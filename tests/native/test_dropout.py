"""Dropout: one mask in every backend, reproducible, of the right probability, kept in backward."""

import math

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.native.dropout import draw_seed, keep_mask, philox
from gqa_kernels.testing import assert_close, assert_gradients_close, make_inputs
from tests.api.test_attention import USABLE, widest

DROPPING = [name for name in USABLE if "dropout" in BACKENDS[name].capabilities.options]
FUSED = [name for name in DROPPING if name != "reference"]
MAP = HeadMap([0, 2, 0, 1, 2])


def words(*values):
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    "key, counter, expected",
    [
        # Known answers of the authors' Random123 library, kat_vectors, philox4x32 10.
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    seed = key[0] | key[1] << 32
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    assert tuple(map(int, philox(torch.tensor(seed), words(*counter)))) == expected


def recovered_mask(backend, dropout_p, q_len, kv_len, device, batch=2):
    """The mask itself: with equal scores and V = identity, out is the mask over its factor."""
    heads, kind = MAP.num_heads, {"dtype": widest(backend), "device": device}
    q = torch.zeros(batch, heads, q_len, 8, **kind)
    k = torch.zeros(batch, 3, kv_len, 8, **kind)
    columns = []
    for first in range(0, kv_len, 64):  # Dv is at most 256
        v = torch.eye(kv_len, **kind)[:, first : first + 64].expand(batch, 3, -1, -1)
        torch.manual_seed(5)
        out = asym_gqa_attention(q, k, v.contiguous(), MAP, dropout_p=dropout_p, backend=backend)
        columns.append(out)
    return torch.cat(columns, -1) * kv_len * (1 - dropout_p)


@pytest.mark.parametrize("backend", DROPPING)
@pytest.mark.parametrize("q_len, kv_len", [(1, 70), (37, 70)])
def test_mask_is_that_of_the_definition(backend, q_len, kv_len, device):
    found = recovered_mask(backend, 0.3, q_len, kv_len, device)
    torch.manual_seed(5)
    expected = keep_mask(draw_seed(torch.device(device)), 0.3, 2, MAP.num_heads, q_len, kv_len)
    atol = max(1e-4, torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=atol, rtol=0)


def test_mask_is_random():
    """Mean within 5 standard deviations, no correlation along any axis."""
    kept = keep_mask(torch.tensor([123456789, 7]), 0.25, 2, 4, 64, 128).double()
    deviation = math.sqrt(0.25 * 0.75 / kept.numel())
    assert abs(kept.mean().item() - 0.75) < 5 * deviation
    centred = kept - kept.mean()
    for dim in range(4):
        lag = centred.narrow(dim, 1, kept.shape[dim] - 1)
        product = (lag * centred.narrow(dim, 0, kept.shape[dim] - 1)).mean().item()
        assert abs(product) < 5 * 0.25 * 0.75 / math.sqrt(lag.numel())
    assert not torch.equal(kept, keep_mask(torch.tensor([123456789, 8]), 0.25, 2, 4, 64, 128))


@pytest.mark.parametrize("backend", DROPPING)
def test_seeds(backend, device):
    q, k, v = make_inputs(1, MAP, 9, 40, 16, dtype=widest(backend), device=device)

    def call():
        return asym_gqa_attention(q, k, v, MAP, dropout_p=0.5, backend=backend)

    torch.manual_seed(0)
    first, second = call(), call()
    torch.manual_seed(0)
    assert torch.equal(first, call()) and not torch.equal(first, second)
    state = torch.get_rng_state()
    asym_gqa_attention(q, k, v, MAP, backend=backend)
    assert torch.equal(state, torch.get_rng_state())  # no dropout draws nothing


@pytest.mark.parametrize(
    "backend, dtype", [(x, dtype) for x in FUSED for dtype in (widest(x), torch.bfloat16)]
)
@pytest.mark.parametrize("q_len", [2, 50])
def test_forward_and_backward(backend, dtype, q_len, device):
    """Keys from a window start anywhere: counters of four keys are cut at both ends."""
    args = make_inputs(2, MAP, q_len, 61, 24, dtype=dtype, device=device)
    options = {
        "causal": True,
        "window": (13, None),
        "dropout_p": 0.2,
        "kv_lengths": torch.tensor([61, 34], device=device),
        "value_head_map": HeadMap([1, 2, 0, 0, 2]),
    }
    leaves = [x.clone().requires_grad_() for x in args]
    torch.manual_seed(3)
    seed = draw_seed(torch.device(device))
    torch.manual_seed(3)
    out, lse = asym_gqa_attention(*leaves, MAP, **options, return_lse=True, backend=backend)
    torch.manual_seed(3)
    exact, exact_lse = asym_gqa_attention(
        *(x.double() for x in args), MAP, **options, return_lse=True, backend="reference"
    )
    torch.manual_seed(3)
    eager = asym_gqa_attention(*args, MAP, **options, backend="reference")
    assert_close("out", out.detach(), exact, [eager])
    torch.testing.assert_close(lse.detach(), exact_lse.float())  # the sum is without dropout
    dout = torch.randn_like(out)
    gradients = dict(zip("qkv", torch.autograd.grad(out, leaves, dout), strict=True))
    assert_gradients_close(gradients, *args, MAP, dout=dout, dropout_seed=seed, **options)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan])
def test_bad_probability(dropout_p):
    q, k, v = make_inputs(1, MAP, 2, 3, 8)
    with pytest.raises(ValueError, match=r"dropout_p must (lie in \[0, 1\)|be finite), got"):
        asym_gqa_attention(q, k, v, MAP, dropout_p=dropout_p)


@pytest.mark.parametrize("backend", DROPPING)
@pytest.mark.parametrize("batch, q_len, kv_len", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_dropout_of_nothing(backend, batch, q_len, kv_len, device):
    kind = {"dtype": widest(backend), "device": device}
    q = torch.zeros(batch, MAP.num_heads, q_len, 8, **kind)
    k = torch.zeros(batch, 3, kv_len, 8, **kind)
    out = asym_gqa_attention(q, k, k, MAP, dropout_p=0.5, backend=backend)
    assert out.shape == q.shape and not out.any()
