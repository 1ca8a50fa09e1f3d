"""Gradients of every backend that has them, against fp64 autograd of the reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gqa_kernels import HeadMap, asym_gqa_attention, explain_backend
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import DIFFERENTIABLE, assert_gradients_close, make_inputs
from tests.api.test_attention import USABLE, widest
from tests.api.test_properties import calls, to_device
from tests.cases.attention import PREFILL_CASES, UNEVEN, WITH_EMPTY, matrix, racing

WITH_BACKWARD = [name for name in USABLE if BACKENDS[name].capabilities.autograd]
FUSED = [name for name in WITH_BACKWARD if name != "reference"]
EXAMPLES = {"triton": 12}


def differentiate(args, options, backend, use_lse=True):
    """Gradients by name of every differentiable argument, and the inputs they belong to."""
    q, k, v, head_map = args
    tensors = {"q": q, "k": k, "v": v, **options}
    leaves = {
        name: tensors[name].detach().requires_grad_()
        for name in DIFFERENTIABLE
        if tensors.get(name) is not None
    }
    call = {**tensors, **leaves}
    out, lse = asym_gqa_attention(
        *(call.pop(name) for name in "qkv"), head_map, **call, return_lse=True, backend=backend
    )
    generator = torch.Generator().manual_seed(3)
    dout, dlse = (
        torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in (out, lse)
    )
    dlse = dlse.masked_fill(lse == -torch.inf, 0) if use_lse else None
    outputs, grads = ((out, lse), (dout, dlse)) if use_lse else ((out,), (dout,))
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return dict(zip(leaves, found, strict=True)), dout, dlse


def check(args, options, backend, use_lse=True):
    gradients, dout, dlse = differentiate(args, options, backend, use_lse)
    assert_gradients_close(gradients, *args, dout=dout, dlse=dlse, **options)
    return gradients


@pytest.mark.parametrize("case, backend, dtype", matrix(FUSED, once=True))
def test_matches_reference(case, backend, dtype, device):
    args, options = case.build(dtype, device)
    check(args, options, backend, use_lse=len(case.id) % 2 == 0)


@pytest.mark.parametrize("backend", FUSED)
def test_random_calls(backend):
    dtypes = sorted(BACKENDS[backend].capabilities.dtypes, key=str)

    @settings(
        max_examples=EXAMPLES.get(backend, 150),
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(calls(dtypes), st.booleans())
    def one(call, use_lse):
        check(*to_device(*call), backend, use_lse)

    one()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("seed", [6, 17, 49, 50])
def test_one_slope_and_one_sink(backend, seed, device):
    """Each gradient is one number that collects the rounding of all rows. If delta is computed
    from the rounded output, these draws fail."""
    head_map = HeadMap([0])
    args = (
        *make_inputs(1, head_map, 20, 70, 64, dtype=torch.bfloat16, device=device, seed=seed),
        head_map,
    )
    drawn = torch.rand(2, 1, generator=torch.Generator().manual_seed(seed)).to(device)
    options = dict(zip(("alibi_slopes", "sinks"), drawn, strict=True))
    check(args, options | {"causal": True}, backend)


@pytest.mark.parametrize("backend", [name for name in FUSED if widest(name) == torch.float32])
@pytest.mark.parametrize("seed", [388, 390, 391, 394, 395, 398])
def test_slopes_of_few_keys(backend, seed, device):
    """Sums of P dP and of P dP distance cancel, so the gradient must add up dS itself."""
    generator = torch.Generator().manual_seed(seed)
    head_map, q_len, kv_len, dim = (
        HeadMap([0, 0]),
        (1, 2, 5)[seed % 3],
        *((64, 8), (17, 1))[seed % 2],
    )
    sizes = make_inputs(1, head_map, q_len, kv_len, dim, value_head_dim=7, device=device, seed=seed)
    options = {
        "alibi_slopes": torch.rand(2, generator=generator) / 4,
        "kv_lengths": torch.randint(1, 17, (1,), generator=generator),
    }
    if seed % 4 < 2:
        options["sinks"] = torch.randn(2, generator=generator) * 2
    options = {name: x.to(device) for name, x in options.items()}
    args = (*(4 * x for x in sizes), head_map)
    gradients, dout, dlse = differentiate(args, options, backend, use_lse=seed % 5 < 2)
    of_slopes = {"alibi_slopes": gradients["alibi_slopes"]}
    assert_gradients_close(of_slopes, *args, dout=dout, dlse=dlse, **options)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("score", [-1023.7, 36.1, 137.3, 999.9, 1725.4])
@pytest.mark.parametrize("softcap", [None, 5e4])
def test_the_only_key_has_a_probability_of_one(backend, score, softcap, device):
    """It has for any score, and then dV equals dO bit for bit."""
    q, k, v = make_inputs(3, HeadMap([0]), 1, 1, 16, dtype=widest(backend), device=device)
    q = q * (score / (q * k).sum(-1, keepdim=True))
    args = (q, k, v, HeadMap([0]))
    gradients, dout, _ = differentiate(args, {"scale": 1.0, "softcap": softcap}, backend)
    assert torch.equal(gradients["v"], dout)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_long_sequences(backend, layout, device):
    """Many tiles in both directions, several parts of a KV head, an interleaved map."""
    head_map = HeadMap([0, 1, 0, 0, 0, 0, 0])
    length = 400 if backend == "cpu" else 150
    args = (
        *make_inputs(
            1,
            head_map,
            length,
            length + 51,
            40,
            dtype=widest(backend),
            device=device,
            layout=layout,
        ),
    )
    check((*args, head_map), {"causal": True, "layout": layout}, backend)


@pytest.mark.parametrize("backend", racing(FUSED))
def test_bitwise_repeatable(backend, device):
    head_map = HeadMap([0, 1, 0, 0, 0, 2, 0])
    args = (*make_inputs(1, head_map, 130, 160, 24, dtype=widest(backend), device=device), head_map)
    options = {
        "causal": True,
        "deterministic": True,
        "alibi_slopes": torch.rand(7, device=device),
        "sinks": torch.rand(7, device=device),
    }
    first, *others = (differentiate(args, options, backend)[0] for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("backend", FUSED)
def test_empty_groups_and_rows_have_zero_gradients(backend, device):
    args = (*make_inputs(2, WITH_EMPTY, 9, 5, 16, dtype=widest(backend), device=device), WITH_EMPTY)
    lengths = torch.tensor([0, 4], device=device)
    gradients, *_ = differentiate(args, {"causal": True, "kv_lengths": lengths}, backend)
    for name in "kv":
        assert not gradients[name][:, [0, 2, 4]].any()
        assert not gradients[name][0].any() and not gradients[name][1, :, 4:].any()
    assert not gradients["q"][0].any() and not gradients["q"][1, :, :5].any()
    assert gradients["q"][1, :, 5:].any()


@pytest.mark.parametrize("backend", FUSED)
def test_garbage_beyond_lengths_is_never_used(backend, device):
    q, k, v = make_inputs(2, UNEVEN, 20, 30, 16, dtype=widest(backend), device=device)
    lengths = torch.tensor([[3, 30, 7], [1, 0, 29]], dtype=torch.int32, device=device)
    options = {"kv_lengths": lengths, "causal": True}
    clean, *_ = differentiate((q, k, v, UNEVEN), options, backend)
    for b in range(2):
        for h in range(3):
            k[b, h, lengths[b, h] :] = torch.nan
            v[b, h, lengths[b, h] :] = torch.inf
    dirty, *_ = differentiate((q, k, v, UNEVEN), options, backend)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize("backend", FUSED)
def test_expanded_and_absent_gradients(backend, device):
    """The gradient of a sum is one element with strides 0; the LSE alone may have one."""
    args = (*make_inputs(1, UNEVEN, 20, 30, 16, dtype=widest(backend), device=device), UNEVEN)
    q = args[0].clone().requires_grad_()
    out, lse = asym_gqa_attention(q, *args[1:], return_lse=True, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert_gradients_close({"q": dq}, q, *args[1:], dout=torch.ones_like(out))
    (dq,) = torch.autograd.grad(lse.sum(), q)
    assert_gradients_close({"q": dq}, q, *args[1:], dout=None, dlse=torch.ones_like(lse))


def test_reference_against_finite_differences():
    """In fp64, with every option; the mask has a gradient too."""
    case = next(c for c in PREFILL_CASES if c.id == "everything")
    case = replace(case, q_len=4, kv_len=6, head_dim=3, value_head_dim=2)
    (q, k, v, head_map), options = case.build(torch.float64, "cpu")
    names = ("alibi_slopes", "sinks", "attn_mask")
    extra = [options.pop(name).double() for name in names]
    hidden = extra[2] == -torch.inf

    def call(q, k, v, slopes, sinks, mask):
        given = dict(zip(names, (slopes, sinks, mask.masked_fill(hidden, -torch.inf)), strict=True))
        out, lse = asym_gqa_attention(
            q, k, v, head_map, **options, **given, return_lse=True, backend="reference"
        )
        return out, lse.masked_fill(lse.isinf(), 0)

    extra[2] = extra[2].masked_fill(hidden, 0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *extra)]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(backend, device):
    q, k, v = make_inputs(
        1, UNEVEN, 5, 7, 16, dtype=widest(backend), device=device, requires_grad=True
    )
    out = asym_gqa_attention(q, k, v, UNEVEN, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward .* backend='reference' only"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", FUSED)
def test_gradient_of_a_mask_needs_the_reference(backend, device):
    q, k, v = make_inputs(1, UNEVEN, 5, 7, 16, dtype=widest(backend), device=device)
    mask = torch.zeros(5, 7, device=device, requires_grad=True)
    reasons = explain_backend(asym_gqa_attention, q, k, v, UNEVEN, attn_mask=mask)
    assert any("mask_gradient" in reason for reason in reasons[backend])
    assert not reasons["reference"]
    with torch.no_grad():
        assert not explain_backend(asym_gqa_attention, q, k, v, UNEVEN, attn_mask=mask)[backend]
    asym_gqa_attention(q, k, v, UNEVEN, attn_mask=mask).sum().backward()
    assert mask.grad is not None


@pytest.mark.parametrize("backend", FUSED)
def test_torch_func_needs_the_reference(backend, device):
    """``auto`` avoids a fused op that would silently drop a derivative."""
    q, k, v = make_inputs(2, UNEVEN, 5, 7, 16, dtype=widest(backend), device=device)

    def call(q, backend="auto"):
        return asym_gqa_attention(q, k, v, UNEVEN, backend=backend).square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(call)(q), expected)
    _, tangent = torch.func.jvp(call, (q,), (k.new_ones(q.shape),))
    torch.testing.assert_close(tangent, expected.sum())
    with pytest.raises(NotImplementedError, match="torch_func"):
        torch.func.grad(lambda q: call(q, backend))(q)
    with pytest.raises(NotImplementedError, match="torch_func"):
        torch.func.jvp(lambda q: call(q, backend), (q,), (q,))


@pytest.mark.parametrize("backend", FUSED)
def test_vmap(backend, device):
    """Values and gradients; what torch.func differentiates is seen below vmap, too."""
    q, k, v = make_inputs(2, UNEVEN, 5, 7, 16, dtype=widest(backend), device=device)

    def call(q, backend="auto"):
        mapped = torch.vmap(lambda q, k, v: asym_gqa_attention(q, k, v, UNEVEN, backend=backend))
        return mapped(q[:, None], k[:, None], v[:, None])[:, 0]

    def square(q):
        return call(q).square().sum()

    torch.testing.assert_close(
        call(q, backend), asym_gqa_attention(q, k, v, UNEVEN, backend=backend)
    )
    leaf = q.clone().requires_grad_()
    out = call(leaf, backend)
    (found,) = torch.autograd.grad(out, leaf, 2 * out.detach())
    transformed = torch.func.grad(square)(q)
    for gradient in (found, transformed):
        assert_gradients_close({"q": gradient}, q, k, v, UNEVEN, dout=2 * out.detach())
    _, tangent = torch.func.jvp(square, (q,), (torch.ones_like(q),))
    torch.testing.assert_close(tangent, transformed.sum())
    with pytest.raises(NotImplementedError, match="torch_func"):
        torch.func.grad(lambda q: call(q, backend).sum())(q)
    with pytest.raises(NotImplementedError, match="torch_func"):
        torch.func.jvp(lambda q: call(q, backend), (q,), (q,))


@pytest.mark.parametrize("backend", FUSED)
def test_what_is_kept_for_the_backward(backend, device):
    """Autograd keeps q, k, v, out and LSE without copies. All else is as small as a map."""
    args = make_inputs(
        1, UNEVEN, 33, 65, 16, dtype=widest(backend), device=device, requires_grad=True
    )
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = asym_gqa_attention(*args, UNEVEN, causal=True, return_lse=True, backend=backend)
    large = {storage for storage, numel in kept.items() if numel > 8 * UNEVEN.num_heads}
    assert large == {x.untyped_storage().data_ptr() for x in (*args, *results)}


@pytest.mark.parametrize("backend", FUSED)
def test_activation_checkpointing(backend, device):
    q, k, v = make_inputs(
        1, UNEVEN, 12, 12, 16, dtype=widest(backend), device=device, requires_grad=True
    )

    def call(q, k, v):
        return asym_gqa_attention(q, k, v, UNEVEN, causal=True, dropout_p=0.3, backend=backend)

    if "dropout" not in BACKENDS[backend].capabilities.options:
        pytest.skip("no dropout")
    torch.manual_seed(0)
    expected = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", WITH_BACKWARD)
def test_autocast_is_sdpas(backend, device):
    """Autocast converts q, k and v to its type, except fp64; gradients have the inputs' types."""
    q, k, v = make_inputs(
        1, UNEVEN, 5, 7, 16, dtype=widest(backend), device=device, requires_grad=True
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        out = asym_gqa_attention(q, k.bfloat16(), v, UNEVEN, backend=backend)
        double = asym_gqa_attention(q.double(), k.double(), v.double(), UNEVEN)
        expanded = q, k.bfloat16()[:, UNEVEN.entries], v[:, UNEVEN.entries]
        assert out.dtype == sdpa(*expanded).dtype == torch.bfloat16
        assert double.dtype == sdpa(*(x.double() for x in expanded)).dtype == torch.float64
    expected = asym_gqa_attention(*(x.bfloat16() for x in (q, k, v)), UNEVEN, backend=backend)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.any()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend, compiler, device):
    torch._dynamo.reset()
    options = {"causal": True, "sinks": torch.rand(6, device=device)}

    def call(q, k, v, sinks):
        out, lse = asym_gqa_attention(
            q * 1.0, k, v, UNEVEN, causal=True, sinks=sinks, return_lse=True, backend=backend
        )
        return out, lse

    args = make_inputs(2, UNEVEN, 21, 21, 16, dtype=widest(backend), device=device)
    leaves = [x.clone().requires_grad_() for x in (*args, options["sinks"])]
    out, lse = torch.compile(call, fullgraph=True, backend=compiler)(*leaves)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    gradients = dict(zip(("q", "k", "v", "sinks"), found, strict=True))
    assert_gradients_close(gradients, *args, UNEVEN, dout=dout, dlse=dlse, **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [name for name in FUSED if widest(name) == torch.float32])
@pytest.mark.parametrize("offset", [-1000.0, 120.0])
@pytest.mark.parametrize("q_len, kv_len", [(1, 90), (5, 90), (40, 70), (100, 120)])
@pytest.mark.parametrize("extra", [{}, {"alibi_slopes": True}, {"value_head_map": True}], ids=str)
def test_scores_that_share_a_large_offset(backend, offset, q_len, kv_len, extra, device):
    """P = exp(S - LSE) only adds up to 1 if S is summed as it was for the LSE."""
    large_scores(UNEVEN, backend, offset, q_len, kv_len, extra, device)


def large_scores(head_map, backend, offset, q_len, kv_len, extra, device="cpu", head_dim=64):
    extra = dict(extra)
    if "alibi_slopes" in extra:
        extra["alibi_slopes"] = torch.rand(head_map.num_heads, device=device) / 8
    if "value_head_map" in extra:
        extra["value_head_map"] = HeadMap([i % 2 for i in range(head_map.num_heads)])
    q, k, v = make_inputs(
        1, head_map, q_len, kv_len, head_dim,
        value_head_map=extra.get("value_head_map"), device=device,
    )  # fmt: skip
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, offset * head_dim**0.5
    check((q, k, v, head_map), {"causal": True, **extra}, backend)
