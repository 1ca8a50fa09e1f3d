"""Auxiliary outputs of the CPU kernels, on every instruction set and for every cut of the work."""

import pytest
import torch

from gqa_kernels import AuxRequest, HeadMap, asym_gqa_attention, asym_gqa_decode
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.auxiliary import attend_with_auxiliary
from gqa_kernels.backends.cpu import CPUBackend
from gqa_kernels.decode import decode_call
from gqa_kernels.native import build
from gqa_kernels.testing import assert_auxiliary_close, make_inputs
from tests.backends.test_cpu import DTYPES, isa, threads  # noqa: F401  (fixtures)
from tests.cache.test_decode import filled, queries
from tests.cases.attention import CASES, UNEVEN
from tests.cases.caches import KINDS

pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None, reason="no compiled kernels and no compiler"
)


def check(q, k, v, head_map, last, **options):
    request = AuxRequest(lse=True, max_scores=True, key_scores=last)
    plain = asym_gqa_attention(q, k, v, head_map, return_lse=True, backend="cpu", **options)
    out, aux = asym_gqa_attention(
        q, k, v, head_map, return_aux=request, backend="cpu", **options
    )  # fmt: skip
    assert torch.equal(out, plain[0]) and torch.equal(aux.lse, plain[1])
    assert_auxiliary_close(aux, attention_call(q, k, v, head_map, **options), last)
    return aux


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_case(isa, dtype):  # noqa: F811
    for number, case in enumerate(CASES):
        args, options = case.build(dtype, "cpu")
        try:
            check(*args, (1, 3, 1000)[number % 3], **options)
        except AssertionError as error:
            raise AssertionError(f"{case.id}: {error}") from error


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_cache(isa, kind):  # noqa: F811
    """Small pages make bundles: the tasks of several heads run in turns over the same keys."""
    for dtype in (torch.float32, torch.bfloat16):
        cache, _ = filled(kind, dtype, "cpu", room=True)
        q = queries(3, UNEVEN, 2, 16, dtype, "cpu")
        request = AuxRequest(max_scores=True, key_scores=1)
        _, aux = asym_gqa_decode(q, cache, UNEVEN, return_aux=request, backend="cpu")
        assert_auxiliary_close(aux, decode_call(q, cache, UNEVEN), 1)


@pytest.mark.parametrize("q_len, kv_len, last", [(1, 9000, 1), (4, 3000, 2), (150, 1500, 150)])
def test_splits_and_blocks_of_rows(threads, q_len, kv_len, last):  # noqa: F811
    """Splits leave their scores to the last of them; blocks of rows and groups with one key head
    and several value heads add up, in an order that no thread changes."""
    head_map, value_map = HeadMap([0, 1, 1, 1]), HeadMap([0, 0, 1, 1])
    q, k, v = make_inputs(1, head_map, q_len, kv_len, 64, value_head_map=value_map)
    for invariant in (False, True):
        for count in (1, 2, 7):
            threads(count)
            found = [
                check(
                    q, k, v, head_map, last, causal=True, value_head_map=value_map,
                    sinks=torch.tensor([0.5, -1.0, 3.0, 0.0]), batch_invariant=invariant,
                    kv_lengths=torch.tensor([[kv_len, 777]]),
                ).key_scores
                for _ in range(2)
            ]  # fmt: skip
            assert torch.equal(*found)


def test_what_is_fused():
    """Calls that need gradients take the reference's pass over the keys."""
    q, k, v = make_inputs(1, UNEVEN, 2, 5, 8)
    backend, request = CPUBackend(), AuxRequest(key_scores=1)
    assert backend.fuses_auxiliary(attention_call(q, k, v, UNEVEN))
    call = attention_call(q.requires_grad_(), k, v, UNEVEN)
    assert not backend.fuses_auxiliary(call)
    build.load()
    out, aux = attend_with_auxiliary(call, request, backend)
    assert out.requires_grad and not aux.key_scores.requires_grad
    assert_auxiliary_close(aux, call, 1)


def test_an_entry_out_of_range():
    """Such a head has no largest score, and gives no key any."""
    build.load()
    q, k, v = make_inputs(1, HeadMap([0, 1, 1]), 2, 5, 8)
    op = torch.ops.gqa_kernels.attention_auxiliary.default
    given = {"max_scores": True, "key_scores": 2}
    _, _, most, sums = op(q, k, v, torch.tensor([0, 99, 1], dtype=torch.int32), **given)
    assert most.isnan().tolist() == [[False, True, False]]
    _, _, expected, expected_sums = op(
        q[:, ::2].contiguous(), k, v, torch.tensor([0, 1], dtype=torch.int32), **given
    )
    assert torch.equal(most[:, ::2], expected) and torch.equal(sums, expected_sums)


def test_opcheck():
    build.load()
    q, k, v = make_inputs(1, UNEVEN, 2, 5, 8)
    torch.library.opcheck(
        torch.ops.gqa_kernels.attention_auxiliary.default,
        (q, k, v, UNEVEN.cpu_tensor),
        {"max_scores": True, "key_scores": 2},
        test_utils=("test_schema", "test_faketensor"),
    )
