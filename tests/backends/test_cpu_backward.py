"""What is particular to the native CPU backward; cases all backends share are in test_gradients."""

import itertools

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention, asym_gqa_varlen_attention
from gqa_kernels.native import build
from gqa_kernels.native.schema import BACKWARD
from gqa_kernels.testing import assert_gradients_close, make_inputs
from tests.api.test_gradients import check, differentiate, large_scores
from tests.backends.test_cpu import DTYPES, isa, op_arguments, threads  # noqa: F401 (fixtures)
from tests.cases.attention import PREFILL_CASES, UNEVEN, WIDE_CASES

pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None, reason="no compiled kernels and no compiler"
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):  # noqa: F811
    for case in PREFILL_CASES[::3] + WIDE_CASES[::3]:
        args, options = case.build(dtype, "cpu")
        try:
            check(args, options, "cpu")
        except AssertionError as error:
            raise AssertionError(f"{case.id}: {error}") from error


def test_every_head_dim(isa):  # noqa: F811
    """All remainders of vectors and panels."""
    head_map = HeadMap([0, 0, 1])
    for dim in [*range(1, 34, 3), 63, 65, 127, 129, 200, 255, 256]:
        args = make_inputs(1, head_map, 7, 11, dim, value_head_dim=257 - dim)
        check((*args, head_map), {"causal": True}, "cpu")


@pytest.mark.parametrize("q_len", [1, 40])
def test_v_may_be_a_view_of_k(isa, q_len):  # noqa: F811
    """Latent attention: V is the first 512 of the 576 numbers of K."""
    head_map = HeadMap([0] * 5)
    q, latent, _ = make_inputs(1, head_map, q_len, 70, 576)
    check((q, latent, latent[..., :512], head_map), {"causal": True}, "cpu")


@pytest.mark.parametrize("q_len, kv_len", [(70, 50), (151, 99), (97, 200), (1, 145)])
def test_tiles_end_anywhere(isa, q_len, kv_len):  # noqa: F811
    head_map = HeadMap([0, 1, 0, 0])
    args = make_inputs(1, head_map, q_len, kv_len, 16)
    for window in ((None, 0), (31, 5)):
        check((*args, head_map), {"window": window}, "cpu")


@pytest.mark.parametrize("value_map", [None, HeadMap([0, 1, 1, 1, 0])])
def test_parts_of_a_head_merge_right_and_repeatably(threads, value_map):  # noqa: F811
    """One KV head with most of the work: it is cut where there are threads to share it."""
    head_map = HeadMap([0, 0, 0, 1, 0])
    args = (*make_inputs(1, head_map, 170, 190, 32, value_head_map=value_map), head_map)
    options = {"causal": True, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0])}
    if value_map is not None:
        options["value_head_map"] = value_map
    for count in (1, 2, 5):
        threads(count)
        first = check(args, options, "cpu")
        for _ in range(3):
            again, *_ = differentiate(args, options, "cpu")
            assert all(torch.equal(first[name], again[name]) for name in first)


def backward_arguments(need=(True, True), **options):
    """Arguments of the op after a forward through its own op."""
    build.load()
    forward = op_arguments(**{"alibi_slopes": torch.rand(6), "sinks": torch.rand(6), **options})
    out, lse = torch.ops.gqa_kernels.attention_forward.default(*forward.values())
    made = {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse), "out": out, "lse": lse}
    known = {**forward, **made, "need_slopes": need[0], "need_sinks": need[1]}
    return {name: known[name] for name in BACKWARD.names}


def op():
    build.load()
    return torch.ops.gqa_kernels.attention_backward.default


@pytest.mark.parametrize("need", [(True, True), (False, False)])
def test_opcheck(need):
    torch.library.opcheck(op(), tuple(backward_arguments(need, causal=True).values()))
    arguments = op_arguments(causal=True, sinks=torch.rand(6))
    arguments |= {name: arguments[name].clone().requires_grad_() for name in "qkv"}
    torch.library.opcheck(
        torch.ops.gqa_kernels.attention_forward.default, tuple(arguments.values())
    )


def test_out_of_range_map_entries_give_nan_and_touch_nothing():
    arguments = backward_arguments()
    good = op()(*arguments.values())
    kept = [0, 2, 3, 5]
    for bad in (-1, 3, 2**31 - 1, -(2**31)):
        head_map = arguments["head_map"].clone()
        head_map[[1, 4]] = bad
        dq, dk, dv, *_ = op()(*{**arguments, "head_map": head_map}.values())
        assert dq[:, [1, 4]].isnan().all()
        torch.testing.assert_close(dq[:, kept], good[0][:, kept])
        assert dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "dout",
            torch.zeros(2, 6, 5, 16, dtype=torch.half),
            "dout must have dtype Float, got Half",
        ),
        ("dout", torch.zeros(2, 6, 4, 16), r"dout must have shape \(2, 6, 5, 16\)"),
        ("dout", torch.zeros(1).expand(2, 6, 5, 16), "dout must have a last dim of stride 1"),
        ("lse", torch.zeros(2, 6, 10)[..., ::2], "lse must be contiguous"),
        ("dropout_p", 1.5, r"dropout_p must lie in \[0, 1\), got 1.5"),
        ("dropout_p", 0.5, "dropout_seed must be given"),
        ("alibi_slopes", None, "alibi_slopes must be given with need_slopes"),
    ],
)
def test_op_refuses_what_memory_safety_forbids(name, value, message):
    arguments = backward_arguments() | {name: value}
    with pytest.raises(RuntimeError, match=message):
        op()(*arguments.values())


def test_gradients_of_strided_tensors_and_bshd():
    q, k, v = make_inputs(2, UNEVEN, 30, 41, 24, layout="bshd", strided=True)
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v)]
    out = asym_gqa_attention(*leaves, UNEVEN, layout="bshd", causal=True, backend="cpu")
    dout = torch.randn(2, 6, 30, 24).transpose(1, 2)
    found = torch.autograd.grad(out, leaves, dout)
    assert_gradients_close(
        dict(zip("qkv", found, strict=True)), q, k, v, UNEVEN, dout=dout, layout="bshd", causal=True
    )


@pytest.mark.parametrize("q_len", [1, 2, 3, 5, 16, 17, 23, 70, 150])
@pytest.mark.parametrize("head_map", [HeadMap([0]), HeadMap([0, 1, 0, 1, 1])], ids=str)
def test_scores_are_summed_as_in_the_forward(isa, threads, head_map, q_len):  # noqa: F811
    """Small and large groups sum in different orders, but the number of threads changes neither."""
    for count in (1, 2, 5):
        threads(count)
        for head_dim in (20, 64, 128):
            large_scores(head_map, "cpu", -1000.0, q_len, 150, {}, head_dim=head_dim)


def test_packed_sequences_sum_scores_as_in_the_forward(isa):  # noqa: F811
    head_map, lengths = HeadMap([0, 1, 0, 0]), [5, 40, 9, 70, 17]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(sum(lengths), heads, 64) * 0.1 for heads in (4, 2, 2))
    q[..., 0], k[..., 0] = 1.0, -8000.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = asym_gqa_varlen_attention(
        *leaves, head_map, offsets, offsets, 70, 70, causal=True, backend="cpu"
    )
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    for begin, end in itertools.pairwise(offsets.tolist()):

        def alone(x, rows=slice(begin, end)):
            return x.detach()[rows].transpose(0, 1)[None]

        gradients = {name: alone(x) for name, x in zip("qkv", found, strict=True)}
        call = (*map(alone, leaves), head_map)
        assert_gradients_close(gradients, *call, dout=alone(dout), causal=True)
