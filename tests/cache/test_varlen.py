"""Packed sequences against each of them by itself, on every backend."""

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention, asym_gqa_varlen_attention, explain_backend
from gqa_kernels.testing import assert_attention_close
from tests.cache.test_decode import USABLE
from tests.cases import INTERLEAVED

Q_LENS, K_LENS = [5, 0, 33, 1, 4], [9, 3, 40, 0, 2]
CU_Q, CU_K = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (Q_LENS, K_LENS))
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scores": {
        "causal": True, "window": (7, None), "softcap": 2.0, "scale": 0.3,
        "alibi_slopes": torch.rand(5, 7, generator=torch.Generator().manual_seed(4)),
        "sinks": torch.linspace(-1, 2, 7),
    },
    "value-map": {"value_head_map": HeadMap([0, 1, 0, 1, 0, 1, 0])},
}  # fmt: skip


def packed(dtype, device, value_heads):
    generator = torch.Generator().manual_seed(0)
    shapes = ((43, 7, 16), (54, 3, 16), (54, value_heads, 24))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_each_sequence(backend, name, dtype, device):
    options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in OPTIONS[name].items()}
    q, k, v = packed(dtype, device, 2 if name == "value-map" else 3)
    cu_q, cu_k = CU_Q.to(device), CU_K.to(device, torch.int32)
    out, lse = asym_gqa_varlen_attention(
        q, k, v, INTERLEAVED, cu_q, cu_k, 33, 40, return_lse=True, backend=backend, **options
    )
    assert out.shape == (43, 7, 24) and out.is_contiguous() and lse.shape == (7, 43)
    for b in range(5):
        some_q, some_k = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        of_sequence = dict(options)
        if "alibi_slopes" in options:
            of_sequence["alibi_slopes"] = options["alibi_slopes"][b]
        assert_attention_close(
            out[None, some_q], q[None, some_q], k[None, some_k], v[None, some_k], INTERLEAVED,
            lse=lse[None, :, some_q], layout="bshd", **of_sequence,
        )  # fmt: skip


def test_gradients_of_the_reference():
    """Through the packing, against each sequence by itself."""
    q, k, v = (x.double().requires_grad_() for x in packed(torch.float32, "cpu", 3))
    out = asym_gqa_varlen_attention(q, k, v, INTERLEAVED, CU_Q, CU_K, 33, 40, causal=True)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    total = 0.0
    for b in range(5):
        some_q, some_k = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        one = asym_gqa_attention(
            q[None, some_q], k[None, some_k], v[None, some_k], INTERLEAVED, causal=True,
            layout="bshd",
        )  # fmt: skip
        total = total + (one[0] * weight[some_q]).sum()
    for got, expected in zip(gradients, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", USABLE)
def test_nothing_packed(backend, device):
    q, k, v = packed(torch.float32, device, 3)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    out = asym_gqa_varlen_attention(
        q[:0], k[:0], v[:0], INTERLEAVED, none, none, 0, 0, backend=backend
    )
    assert out.shape == (0, 7, 24)
    call = (q, k, v, INTERLEAVED, CU_Q.to(device), CU_K.to(device), 33, 40)
    assert explain_backend(*call)[backend] == []
