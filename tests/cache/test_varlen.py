"""Packed sequences against each of them by itself, on every backend."""

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention, asym_gqa_varlen_attention, explain_backend
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import DIFFERENTIABLE, assert_attention_close, assert_gradients_close
from gqa_kernels.varlen import varlen_call
from tests.api.test_attention import USABLE as BACKENDS_HERE
from tests.api.test_attention import widest
from tests.cases.attention import INTERLEAVED

Q_LENS, K_LENS = [5, 0, 33, 1, 4], [9, 3, 40, 0, 2]
CU_Q, CU_K = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (Q_LENS, K_LENS))
USABLE = [name for name in BACKENDS_HERE if "varlen" in BACKENDS[name].capabilities.caches]
MATRIX = [(name, dtype) for name in USABLE for dtype in (widest(name), torch.bfloat16)]
FUSED = [
    name for name in USABLE if name != "reference" and BACKENDS[name].capabilities.varlen_autograd
]
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


@pytest.mark.parametrize("backend, dtype", MATRIX)
@pytest.mark.parametrize("name", OPTIONS)
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


@pytest.mark.parametrize("backend, dtype", [(x, dtype) for x, dtype in MATRIX if x in FUSED])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_match_each_sequence(backend, name, dtype, device):
    options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in OPTIONS[name].items()}
    q, k, v = (  # with two tokens of no sequence
        torch.cat([x, x[:2] * torch.nan]) for x in packed(dtype, device, 2 + ("map" not in name))
    )
    cu_q, cu_k = CU_Q.to(device), CU_K.to(device)
    leaves = {"q": q, "k": k, "v": v, **options}
    leaves = {x: leaves[x].clone().requires_grad_() for x in DIFFERENTIABLE if x in leaves}
    call = {**options, **leaves}
    out, lse = asym_gqa_varlen_attention(
        *(call.pop(x) for x in "qkv"), INTERLEAVED, cu_q, cu_k, 33, 40, return_lse=True,
        backend=backend, **call,
    )  # fmt: skip
    assert out.shape == (45, 7, 24) and lse.shape == (7, 45)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse = dlse.masked_fill(lse == -torch.inf, 0)
    dout[43:], dlse[:, 43:] = torch.nan, torch.nan
    found = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    found = dict(zip(leaves, found, strict=True))
    assert not found["q"][43:].any() and not found["k"][54:].any() and not found["v"][54:].any()
    sinks = 0.0
    for b in range(5):
        some_q, some_k = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        args = [x[None, s].transpose(1, 2) for x, s in ((q, some_q), (k, some_k), (v, some_k))]
        of_sequence = {**options}
        gradients = {
            x: found[x][None, s].transpose(1, 2)
            for x, s in (("q", some_q), ("k", some_k), ("v", some_k))
        }
        if "alibi_slopes" in options:
            of_sequence["alibi_slopes"] = options["alibi_slopes"][b]
            gradients["alibi_slopes"] = found["alibi_slopes"][b]
        call = dict(
            dout=dout[None, some_q].transpose(1, 2), dlse=dlse[None, :, some_q], **of_sequence
        )
        assert_gradients_close(gradients, *args, INTERLEAVED, **call)
        if "sinks" in options:
            sinks = sinks + dense_sinks_gradient(args, dict(call), backend)
    if "sinks" in options:
        torch.testing.assert_close(found["sinks"], sinks, rtol=1e-4, atol=1e-4)


def dense_sinks_gradient(args, call, backend):
    dout, dlse = call.pop("dout"), call.pop("dlse")
    call["sinks"] = call["sinks"].clone().requires_grad_()
    outputs = asym_gqa_attention(*args, INTERLEAVED, **call, return_lse=True, backend=backend)
    return torch.autograd.grad(outputs, call["sinks"], (dout, dlse))[0]


@pytest.mark.parametrize("backend", FUSED)
def test_compiled_and_under_autocast(backend, device):
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in packed(torch.float32, device, 3)]
    cu_q, cu_k = CU_Q.to(device), CU_K.to(device)

    def call(q, k, v):
        with torch.autocast(device, dtype=torch.bfloat16):
            return asym_gqa_varlen_attention(
                q, k, v, INTERLEAVED, cu_q, cu_k, 33, 40, causal=True, backend=backend
            )

    expected = call(*leaves)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    dout = torch.randn_like(out)
    for got, wanted in zip(
        *(torch.autograd.grad(x, leaves, dout) for x in (out, expected)), strict=True
    ):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)
    torch._dynamo.reset()


def test_longest_sequence_is_no_longer_than_all_tokens():
    """Sizes of grids that are more than enough."""
    inputs = varlen_call(*packed(torch.float32, "cpu", 3), INTERLEAVED, CU_Q, CU_K, 999, 999)
    assert (inputs.max_q_len, inputs.max_kv_len) == (43, 54)


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
    q, k, v = packed(widest(backend), device, 3)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    out = asym_gqa_varlen_attention(
        q[:0], k[:0], v[:0], INTERLEAVED, none, none, 0, 0, backend=backend
    )
    assert out.shape == (0, 7, 24)
    call = (q, k, v, INTERLEAVED, CU_Q.to(device), CU_K.to(device), 33, 40)
    assert explain_backend(asym_gqa_varlen_attention, *call)[backend] == []
