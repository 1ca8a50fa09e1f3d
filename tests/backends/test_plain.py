"""The short way of plain calls: the same results, and only where nothing would be lost."""

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention, available_backends
from gqa_kernels.backends import dispatch, plain
from gqa_kernels.testing import make_inputs

MAP = HeadMap([0, 2, 0, 1, 2, 0])
pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="no CPU kernels and no compiler"
)


@pytest.fixture
def long_way(monkeypatch):
    """A list that grows by one with every call that goes the long way. Outside deterministic mode,
    where the shortest op is taken."""
    torch.use_deterministic_algorithms(False)
    calls, select = [], dispatch.select

    def counted(inputs, backend):
        calls.append(backend)
        return select(inputs, backend)

    monkeypatch.setattr("gqa_kernels.attention.select", counted)
    asym_gqa_attention(*make_inputs(1, MAP, 1, 1, 8), MAP, softcap=1.0)  # the kernels are loaded
    calls.clear()
    return calls


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("q_len", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_results_and_strides(long_way, layout, q_len, dtype):
    tensors = make_inputs(2, MAP, q_len, 7, 16, value_head_dim=24, dtype=dtype, layout=layout)
    for options in ({}, {"causal": True, "scale": 0.3}):
        found = asym_gqa_attention(*tensors, MAP, layout=layout, return_lse=True, **options)
        assert not long_way
        entries = list(MAP)  # not a HeadMap: the long way
        want = asym_gqa_attention(*tensors, entries, layout=layout, return_lse=True, **options)
        assert long_way.pop()
        for x, y in zip(found, want, strict=True):
            assert torch.equal(x, y) and x.shape == y.shape and x.dtype == y.dtype
            assert x.is_contiguous() == y.is_contiguous()
        short = asym_gqa_attention(*tensors, MAP, layout=layout, **options)
        assert torch.equal(short, want[0]) and short.stride() == found[0].stride()
        assert not long_way


def test_what_is_not_plain_goes_the_long_way(long_way):
    q, k, v = make_inputs(1, MAP, 2, 3, 8)
    leaf = q.clone().requires_grad_()

    asym_gqa_attention(leaf, k, v, MAP).sum().backward()
    assert long_way.pop() and leaf.grad.abs().sum() > 0
    with torch.no_grad():
        asym_gqa_attention(leaf, k, v, MAP)
    assert not long_way

    with torch.autocast("cpu", torch.bfloat16):
        assert asym_gqa_attention(q, k, v, MAP).dtype == torch.bfloat16
    assert long_way.pop()
    assert asym_gqa_attention(*(x.double() for x in (q, k, v)), MAP).dtype == torch.float64
    assert long_way.pop()
    grad = torch.func.grad(lambda x: asym_gqa_attention(x, k, v, MAP).sum())(q)
    assert long_way.pop() and torch.allclose(grad, leaf.grad, atol=1e-6)
    _, tangent = torch.func.jvp(lambda x: asym_gqa_attention(x, k, v, MAP), (q,), (q,))
    assert long_way.pop() and tangent.abs().sum() > 0
    compiled = torch.compile(lambda *x: asym_gqa_attention(*x, MAP), backend="eager")
    assert torch.equal(compiled(q, k, v), asym_gqa_attention(q, k, v, MAP))


@pytest.mark.parametrize("deterministic", [False, True])
def test_refused_calls_are_left_to_the_long_way(deterministic):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    q, k, v = make_inputs(1, MAP, 2, 3, 8)
    plain_call = (MAP, False, None, "bhsd", False)
    asym_gqa_attention(q, k, v, MAP, softcap=1.0)  # the kernels are loaded
    assert plain.attend(q, k, v, *plain_call) is not None
    for bad in (
        (q, k[0], v), (q[0, 0], k, v), (q, k.half(), v), (q, k.to("meta"), v), (q, k[:, :2], v),
        (q, k, v[:, :2]), (q, k[..., :4], v), (q, k, v[:, :, :2]), (q[:, :4], k, v),
        (q.mT.contiguous().mT, k, v), (q.int(), k.int(), v.int()), (q[..., :0], k[..., :0], v),
        (q.repeat(2, 1, 1, 1), k, v), (*(x.repeat(1, 1, 1, 40) for x in (q, k, v)),),
    ):  # fmt: skip
        assert plain.attend(*bad, *plain_call) is None
    for scale, layout in ((float("nan"), "bhsd"), ("1", "bhsd"), (None, "sbhd")):
        assert plain.attend(q, k, v, MAP, False, scale, layout, False) is None


def test_opcheck():
    q, k, v = make_inputs(2, MAP, 3, 5, 8, value_head_dim=16)
    asym_gqa_attention(q, k, v, MAP, softcap=1.0)
    op = torch.ops.gqa_kernels.plain_attention_forward.default
    for scale, bshd in ((None, False), (0.5, True)):
        torch.library.opcheck(op, (q, k, v, MAP.cpu_tensor, 3, scale, True, bshd))


def test_the_op_refuses_what_would_be_read_elsewhere():
    """Entries out of range give NaN, as everywhere; other heads than the map's are an error."""
    q, k, v = make_inputs(1, MAP, 2, 3, 8)
    op = torch.ops.gqa_kernels.plain_attention_forward
    wrong = MAP.cpu_tensor.clone()
    wrong[1], wrong[4] = 3, -1
    out = op(q, k, v, wrong, 3, None, False, False)
    assert out.isnan().flatten(2).all(2).tolist() == [[False, True, False, False, True, False]]
    for bad in ((q, k, v, wrong, 2), (q, k, v[:, :2], wrong, 3), (q, k, v, wrong.long(), 3)):
        with pytest.raises(RuntimeError, match="must have"):
            op(*bad, None, False, False)
