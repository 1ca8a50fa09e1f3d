"""Results written to the caller's memory: the same numbers, and nothing outside is touched."""

import pytest
import torch

from gqa_kernels import (
    AuxRequest,
    HeadMap,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    available_backends,
    plan_decode,
)
from gqa_kernels.attention import attention_call
from gqa_kernels.native import schema
from gqa_kernels.testing import make_inputs
from tests.cache.test_decode import filled, queries
from tests.cases.attention import UNEVEN, interpreted
from tests.cases.caches import Kind

BACKENDS = available_backends()
HEAD_MAP = HeadMap([0, 2, 0, 1, 1])


def inside(shape, dtype, device):
    """A NaN-filled tensor with a margin: the view of this shape inside it, and the whole tensor."""
    whole = torch.full([n + 2 for n in shape[:-1]] + [shape[-1] + 3], torch.nan, dtype=dtype)
    whole = whole.to(device)
    part = whole
    for dim, n in enumerate(shape):
        part = part.narrow(dim, 1, n)
    return part, whole


def hold(function, expected, *, dtype, device, **options):
    """Pass memory for both results, then for ``out`` alone; compare with ``expected``."""
    out, whole = inside(expected[0].shape, dtype, device)
    place = torch.full(expected[1].shape, torch.nan, device=device)
    found = function(out=out, lse=place, return_lse=True, **options)
    assert found[0] is out and found[1] is place
    assert torch.equal(out, expected[0]) and torch.equal(place, expected[1])
    assert int(whole.isnan().sum()) == whole.numel() - out.numel()
    alone = torch.full_like(expected[0], torch.nan)
    assert function(out=alone, **options) is alone and torch.equal(alone, expected[0])
    new, place = function(lse=place.fill_(torch.nan), return_lse=True, **options)
    assert torch.equal(new, expected[0]) and torch.equal(place, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_attention(backend, layout, device):
    for dtype, q_len in ((torch.float32, 3), (torch.bfloat16, 20)):
        q, k, v = make_inputs(1, HEAD_MAP, q_len, 33, 16, dtype=dtype, value_head_dim=24)
        if layout == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k, v = (x.to(device) for x in (q, k, v))

        def run(q=q, k=k, v=v, **results):
            return asym_gqa_attention(
                q, k, v, HEAD_MAP, causal=True, layout=layout, backend=backend, **results
            )

        hold(run, run(return_lse=True), dtype=dtype, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend, device):
    q, k, v = (torch.randn(12, heads, 16, device=device) for heads in (5, 3, 3))
    offsets = torch.tensor([0, 5, 12], device=device)

    def run(**results):
        return asym_gqa_varlen_attention(
            q, k, v, HEAD_MAP, offsets, offsets, 7, 7, backend=backend, **results
        )

    hold(run, run(return_lse=True), dtype=torch.float32, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Kind(), Kind(3, "NHD", format="int8")], ids=str)
def test_decode(backend, kind, device):
    cache, _ = filled(kind, torch.float32, device, lengths=(5, 0), room=True)
    q = queries(2, UNEVEN, 2, 16, torch.float32, device)
    new = [torch.randn(2, 3, 2, dim, device=device) for dim in (16, 24)]

    def run(**results):
        given = dict(zip(("k_new", "v_new"), new, strict=True))
        return asym_gqa_decode(q, cache, UNEVEN, backend=backend, advance=False, **given, **results)

    expected = run(return_lse=True)
    hold(run, expected, dtype=torch.float32, device=device)
    if interpreted(backend):
        return
    plan = plan_decode(q, cache, UNEVEN, backend=backend)
    hold(lambda **results: plan(q, cache, *new, **results), expected, dtype=torch.float32,
         device=device)  # fmt: skip


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not interpreted(name)])
def test_a_compiled_graph_writes_there(backend, device):
    q, k, v = (x.to(device) for x in make_inputs(1, HEAD_MAP, 3, 9, 16))

    def run(q, out):
        return asym_gqa_attention(q * 2, k, v, HEAD_MAP, out=out, backend=backend) + 1

    out = torch.full_like(q, torch.nan)
    result = torch.compile(run, backend="aot_eager", fullgraph=True)(q, out)
    expected = asym_gqa_attention(q * 2, k, v, HEAD_MAP, backend=backend)
    assert torch.equal(out, expected) and torch.equal(result, expected + 1)


def test_opcheck():
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled kernels")
    q, k, v = make_inputs(1, HEAD_MAP, 3, 9, 16)
    asym_gqa_attention(q, k, v, HEAD_MAP, backend="cpu")  # loads the op
    arguments = schema.FORWARD.arguments_of(attention_call(q, k, v, HEAD_MAP))
    for lse in (None, torch.empty(q.shape[:3])):
        torch.library.opcheck(
            torch.ops.gqa_kernels.attention_into.default, (*arguments, torch.empty_like(q), lse)
        )


Q, K, V = make_inputs(2, HEAD_MAP, 4, 9, 16)
ROWS = (2, 5, 4)
ERRORS = [
    ({"out": torch.empty(2, 5, 4, 17)}, ValueError, r"out must have shape \(2, 5, 4, 16\) as \["),
    ({"out": torch.empty(2, 5, 4)}, ValueError, "out must have 4 dimensions"),
    ({"out": torch.empty(*ROWS, 16).half()}, TypeError, "out.dtype must be torch.float32"),
    ({"out": torch.empty(*ROWS, 32)[..., ::2]}, ValueError, r"out.stride\(-1\) must be 1, got 2"),
    ({"out": torch.empty(*ROWS, 16, device="meta")}, ValueError, "out.device must equal q.device"),
    ({"out": 3}, TypeError, "out must be a torch.Tensor, got int"),
    ({"out": torch.empty(*ROWS, 16, requires_grad=True)}, ValueError, "out.requires_grad must be"),
    ({"lse": torch.empty(ROWS)}, ValueError, "lse must be None without return_lse=True"),
    ({"lse": torch.empty(2, 4, 5), "return_lse": True}, ValueError, "lse must have shape"),
    ({"lse": torch.empty(ROWS).half(), "return_lse": True}, TypeError, "lse.dtype must be"),
    ({"lse": torch.empty(2, 4, 5).mT, "return_lse": True}, ValueError, "lse must be contiguous"),
    ({"out": torch.empty(*ROWS, 16), "return_aux": AuxRequest(lse=True)}, ValueError,
     "out and lse must be None with return_aux"),
]  # fmt: skip


@pytest.mark.parametrize("given, error, message", ERRORS)
def test_errors(given, error, message):
    with pytest.raises(error, match=message):
        asym_gqa_attention(Q, K, V, HEAD_MAP, backend="reference", **given)


def test_gradients_are_refused():
    with pytest.raises(ValueError, match="out and lse must be None where an input requires grad"):
        asym_gqa_attention(Q.clone().requires_grad_(), K, V, HEAD_MAP, out=torch.empty_like(Q))
    with torch.no_grad():
        asym_gqa_attention(Q.clone().requires_grad_(), K, V, HEAD_MAP, out=torch.empty_like(Q))
