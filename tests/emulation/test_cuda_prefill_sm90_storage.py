"""The Hopper prefill kernel over pages and packed sequences: its PTX, executed by the emulator with
its checks on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gqa_kernels.attention import attention_call
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.testing import make_inputs
from tools.ptxsim import PtxError

from .compiled_units import unavailable_reason
from .cuda_cache import NEVER, paged
from .cuda_harness import Call, Phase, Result, check, make_call
from .test_cuda_prefill_sm90 import HOST, SMALL, phase_for

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=unavailable_reason() or "emulator present"
)
SLOW = pytest.mark.slow


def paged_inputs(lengths: list[int], q_len: int, head_dim: int = 64, **options) -> AttentionCall:
    q, k, v = make_inputs(len(lengths), SMALL, q_len, max(lengths), head_dim, dtype=torch.bfloat16)
    kv_lengths = torch.tensor([[length] * SMALL.num_kv_heads for length in lengths])
    return attention_call(q, k, v, SMALL, kv_lengths=kv_lengths, **{"causal": True, **options})


@pytest.mark.parametrize(
    "page_size, head_dim, options",
    [
        (16, 64, {}),
        (24, 64, {"softcap": 3.0}),
        pytest.param(8, 128, {}, marks=SLOW),
        pytest.param(64, 128, {"causal": False}, marks=SLOW),
        pytest.param(256, 128, {"causal": False}, marks=SLOW),
        pytest.param(16, 256, {"window": (50, 0)}, marks=SLOW),
    ],
)
def test_paged(page_size: int, head_dim: int, options: dict):
    """Whole blocks and partial ones, in boxes of 8 to 128 keys; NaN in slots without a key."""
    lengths = [310, 41]
    inputs = paged_inputs(lengths, 33, head_dim, **options)
    for seed in range(2):
        call = paged(inputs, page_size, lengths, packed=seed == 0)
        check(inputs, phase_for(inputs).run(call, num_sms=2, seed=seed))


@pytest.mark.parametrize("missing", [0, 2, 5])
def test_a_page_that_is_not_in_storage(missing: int):
    """NaN for the rows that see its keys, and for them only."""
    lengths, page_size, q_len = [90, 41], 16, 33
    inputs = paged_inputs(lengths, q_len)
    call = paged(inputs, page_size, lengths)
    call.tensors["page_table"][0, :, missing] = NEVER
    result = phase_for(inputs).run(call)
    hidden = max(0, missing * page_size - (lengths[0] - q_len))  # tokens before that page's keys
    assert result.out[0, :, hidden:].isnan().all() and result.lse[0, :, hidden:].isnan().all()
    assert result.out[0, :, :hidden].isfinite().all() and result.out[1].isfinite().all()


def test_each_page_is_looked_up_once_for_a_tile():
    """Four bytes for each box of keys, and TMA moves what it moves of dense tensors."""
    kv_len, page_size = 384, 16
    inputs = paged_inputs([kv_len], 64)
    result = phase_for(inputs).run(paged(inputs, page_size, [kv_len]))
    (report,) = result.reports
    assert report.bank_conflicts == 0
    queries, keys = 192 * 64 * 2, 2 * kv_len * 64 * 2  # a whole tile of Q: its last rows are zeros
    assert report.tma_bytes_loaded == SMALL.num_heads * (queries + keys)
    loads = [s for s in report.memory_sites if s["kind"] == "global" and " ld." in s["where"]]
    page_ids = [s["bytes"] for s in loads if "inlined at producer.cuh" in s["where"]]
    assert sorted(page_ids)[:2] == [4 * 8 * SMALL.num_heads, 4 * 16 * SMALL.num_heads]


Q_OFFSETS, K_OFFSETS = [0, 150, 150, 161, 200, 203], [0, 77, 90, 90, 200, 330]


def packed_call(inputs: AttentionCall, q_offsets: list[int], k_offsets: list[int]) -> Call:
    """Queries by offsets, keys from their first slots on, as the host code passes them."""
    begins, ends = (torch.tensor(x, dtype=torch.int32) for x in (k_offsets[:-1], k_offsets[1:]))
    longest = max(b - a for a, b in pairwise(q_offsets))
    call = make_call(
        inputs.replace(kv_lengths=(ends - begins)[:, None].expand(-1, SMALL.num_kv_heads)),
        batch=len(begins), max_q_len=longest, kv_begin=begins,
        q_offsets=torch.tensor(q_offsets, dtype=torch.int32),
    )  # fmt: skip
    call.params.k_stride.b = call.params.v_stride.b = 0
    call.params.num_pages = len(begins)
    return call


def check_packed(inputs: AttentionCall, result: Result, q_offsets, k_offsets) -> None:
    for b in range(len(q_offsets) - 1):
        tokens, keys = slice(*q_offsets[b : b + 2]), slice(*k_offsets[b : b + 2])
        part = inputs.replace(
            q=inputs.q[:, :, tokens], k=inputs.k[:, :, keys], v=inputs.v[:, :, keys]
        )
        if part.q_len:
            check(part, Result(result.out[:, :, tokens], result.lse[:, :, tokens]))


@pytest.mark.parametrize(
    "head_dim, value_head_dim, options",
    [
        (64, 64, {"causal": True}),
        (40, 24, {"softcap": 3.0}),
        pytest.param(128, 128, {}, marks=SLOW),
        pytest.param(128, 128, {"causal": True}, marks=SLOW),
        pytest.param(256, 256, {"window": (50, 10)}, marks=SLOW),
    ],
)
def test_packed_sequences(head_dim: int, value_head_dim: int, options: dict):
    """Whole tiles and parts of them; a sequence without queries, one without keys. The output of
    one sequence's last tile ends where the next sequence's begins."""
    q, k, v = make_inputs(
        1, SMALL, Q_OFFSETS[-1], K_OFFSETS[-1], head_dim, dtype=torch.bfloat16, layout="bshd",
        value_head_dim=value_head_dim,
    )  # fmt: skip
    inputs = attention_call(q, k, v, SMALL, layout="bshd", **options)
    for seed in range(2):
        call = packed_call(inputs, Q_OFFSETS, K_OFFSETS)
        result = phase_for(inputs).run(call, num_sms=2, seed=seed)
        check_packed(inputs, result, Q_OFFSETS, K_OFFSETS)


def test_many_packed_sequences():
    """More than a warp counts at a time, most of them short, some empty."""
    counts = [(7 * b) % 5 for b in range(70)]
    counts[40] = 200
    offsets = [sum(counts[:b]) for b in range(71)]
    q, k, v = make_inputs(1, SMALL, offsets[-1], offsets[-1], 64, dtype=torch.bfloat16)
    inputs = attention_call(q, k, v, SMALL, causal=True)
    result = phase_for(inputs).run(packed_call(inputs, offsets, offsets), num_sms=3)
    check_packed(inputs, result, offsets, offsets)


def test_packed_queries_over_pages():
    """A chunk of prefill: packed queries of different lengths, keys in pages."""
    lengths, q_offsets = [200, 41, 130], [0, 70, 75, 200]
    q, k, v = make_inputs(3, SMALL, 200, 200, 64, dtype=torch.bfloat16)
    kv_lengths = torch.tensor(lengths, dtype=torch.int32)[:, None].expand(3, SMALL.num_kv_heads)
    inputs = attention_call(q[:1], k[:1], v[:1], SMALL, causal=True)
    storage = inputs.replace(k=k, v=v, kv_lengths=kv_lengths)
    call = paged(
        storage, 16, lengths, q_offsets=torch.tensor(q_offsets, dtype=torch.int32), max_q_len=125
    )
    result = phase_for(inputs).run(call, num_sms=2)
    for b, length in enumerate(lengths):
        tokens = slice(*q_offsets[b : b + 2])
        part = inputs.replace(
            q=q[:1, :, tokens], k=k[b : b + 1, :, :length], v=v[b : b + 1, :, :length]
        )
        check(part, Result(result.out[:, :, tokens], result.lse[:, :, tokens]))


BROKEN = {
    "pages of the same block": (
        "producer.cuh", "look_up_page<C>(arguments, keys, key0 - C::kBlockN)",
        "look_up_page<C>(arguments, keys, key0)"),
    "values from the next block's pages": (
        "producer.cuh", "page_before = page;", "page_before = next_page;"),
    "a missing page let through": ("producer.cuh", "return stored ? page : kMissingPage",
        "return stored ? page : kBeyondKeys"),
    "NaN written without a fence": (
        "producer.cuh", "      fence_async_proxy();\n", ""),
    "bytes of missing boxes expected": ("producer.cuh", "bytes -= ", "bytes -= 0 * "),
    "sequence's end ignored": (
        "epilogue.cuh", "params.q_offsets != nullptr && row0", "false && row0"),
    "first token of packed queries": (
        "consumer.cuh", "rows.token0 = tile.token0;", "rows.token0 = 0;"),
    "sequences counted once": ("scheduler.cuh", "before = __shfl_sync(~0u, end, 31);", ""),
}  # fmt: skip


@SLOW
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_noticed(name: str):
    broken = Phase("sm90", "prefill", (*HOST, "bf16_d64"), (BROKEN[name],))
    lengths = [310, 150]
    inputs = paged_inputs(lengths, 33)
    offsets = [*range(40), 240, 250]
    q, k, v = make_inputs(1, SMALL, 250, 250, 64, dtype=torch.bfloat16)
    packed_inputs = attention_call(q, k, v, SMALL, causal=True)
    with pytest.raises((AssertionError, PtxError)):
        check(inputs, broken.run(paged(inputs, 16, lengths), num_sms=2))
        call = paged(inputs, 16, lengths)
        call.tensors["page_table"][0, :, 2] = NEVER
        assert broken.run(call, num_sms=2).out[0].isnan().all()
        result = broken.run(packed_call(packed_inputs, offsets, offsets), num_sms=2)
        check_packed(packed_inputs, result, offsets, offsets)
