"""The sm_80 prefill kernels' compiled PTX, executed by the emulator with its checks on: bounds,
races, uninitialised shared memory, copies not waited for."""

from __future__ import annotations

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.testing import make_inputs
from tests.cases.attention import INTERLEAVED, PREFILL_CASES, UNEVEN, WITH_EMPTY, Case
from tools.ptxsim import PtxError

from .compiled_units import unavailable_reason
from .cuda_cache import NEVER, paged
from .cuda_harness import (
    Phase,
    Result,
    check,
    compiled,
    emulate,
    make_call,
)

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=unavailable_reason() or "emulator present"
)

SMALL = HeadMap([1, 0, 1], num_kv_heads=3)  # interleaved, with an empty group
UNITS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
QUICK = {"causal-more-queries-than-keys", "everything", "lengths-per-head", "strided", "no-keys"}
# Of K from block to block, so that maxima grow, as rescaling on demand must notice, and fall again.
GROWTH = torch.tensor([1, 4, 2, 16, 1, 64]).repeat_interleave(64)[:330, None]


def phase_for(inputs: AttentionCall) -> Phase:
    dim = max(inputs.head_dim, inputs.value_head_dim)
    head_dim_class = next(d for d in (64, 128, 256) if dim <= d)
    return compiled("sm80", "prefill", "launch", f"{UNITS[inputs.dtype]}_d{head_dim_class}")


def attend(
    head_map: HeadMap, q_len: int, kv_len: int, head_dim: int = 64, dtype=torch.bfloat16,
    batch: int = 1, seed: int = 0, **options,
) -> Result:  # fmt: skip
    """Run and check one call."""
    q, k, v = make_inputs(batch, head_map, q_len, kv_len, head_dim, dtype=dtype)
    inputs = attention_call(q, k, v, head_map, **options)
    result = emulate(phase_for(inputs), inputs, seed=seed)
    check(inputs, result)
    return result


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.id, marks=[] if c.id in QUICK else pytest.mark.slow)
        for c in PREFILL_CASES
    ],
)
def test_options(case: Case):
    (q, k, v, head_map), options = case.build(torch.bfloat16, "cpu")
    inputs = attention_call(q, k, v, head_map, **options)
    check(inputs, emulate(phase_for(inputs), inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "window-both", "additive-mask", "dims-7-250"])
def test_options_in_fp16(name: str):
    (case,) = (c for c in PREFILL_CASES if c.id == name)
    (q, k, v, head_map), options = case.build(torch.float16, "cpu", layout="bshd")
    inputs = attention_call(q, k, v, head_map, **options)
    check(inputs, emulate(phase_for(inputs), inputs))


def test_order_of_warps_does_not_matter():
    """More blocks of keys than the ring has slots, more than one tile of rows."""
    first, *others = (
        attend(SMALL, 150, 290, 128, torch.float16, seed=seed, causal=True).out
        for seed in (0, 1, 2)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "head_map, head_dim, dtype, options",
    [
        (UNEVEN, 40, torch.bfloat16, {"causal": True}),
        (SMALL, 96, torch.float16, {"window": (40, 10)}),
        (SMALL, 256, torch.bfloat16, {"causal": True}),
        pytest.param(WITH_EMPTY, 128, torch.bfloat16, {"causal": True}, marks=pytest.mark.slow),
        pytest.param(INTERLEAVED, 64, torch.float16, {}, marks=pytest.mark.slow),
        pytest.param(INTERLEAVED, 192, torch.float16, {"causal": True}, marks=pytest.mark.slow),
    ],
)
def test_head_dims(head_map: HeadMap, head_dim: int, dtype: torch.dtype, options: dict):
    attend(head_map, 131, 203, head_dim, dtype, **options)


@pytest.mark.parametrize(
    "q_len, head_dim, dtype",
    [
        (1, 64, torch.bfloat16),
        pytest.param(150, 128, torch.float16, marks=pytest.mark.slow),
        pytest.param(70, 256, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_dropout(q_len: int, head_dim: int, dtype: torch.dtype):
    """What dropout keeps is what the reference keeps for the same seed; the LSE is without it."""
    q, k, v = make_inputs(2, SMALL, q_len, 150, head_dim, dtype=dtype)
    torch.manual_seed(1)
    lengths = torch.tensor([[150, 7, 64], [149, 0, 101]])
    inputs = attention_call(
        q, k, v, SMALL, causal=True, kv_lengths=lengths, dropout_p=0.3
    ).draw_dropout_seed()
    check(inputs, emulate(phase_for(inputs), inputs))


def test_large_scores_rescale_the_output():
    q, k, v = make_inputs(1, SMALL, 130, 330, 64, dtype=torch.bfloat16)
    k *= GROWTH
    inputs = attention_call(q, k, v, SMALL, causal=True)
    check(inputs, emulate(phase_for(inputs), inputs))


def test_unused_slots_are_not_read():
    q, k, v = make_inputs(2, SMALL, 40, 150, 64, dtype=torch.bfloat16)
    lengths = torch.tensor([[7, 150, 64], [0, 65, 3]])
    for b in range(2):
        for h in range(3):
            k[b, h, lengths[b, h] :] = v[b, h, lengths[b, h] :] = torch.nan
    inputs = attention_call(q, k, v, SMALL, causal=True, kv_lengths=lengths)
    check(inputs, emulate(phase_for(inputs), inputs))


def test_sections_of_heads():
    """K and V larger than L2: pairs of sequence and head go in sections, the last one smaller."""
    head_map, kv_len, used = HeadMap([1, 0, 2, 1, 1]), 27_000, 70
    q, k, v = make_inputs(2, head_map, 130, used, 64, dtype=torch.bfloat16)
    inputs = attention_call(q, k, v, head_map, causal=True)
    k, v = (
        x.new_full((2, 3, kv_len, 64), torch.nan).index_copy_(2, torch.arange(used), x)
        for x in (k, v)
    )
    lengths = torch.full((2, 3), used, dtype=torch.int32)
    result = emulate(phase_for(inputs), inputs.replace(k=k, v=v, kv_lengths=lengths))
    check(inputs, result)


def test_invalid_map_entries():
    """As a device tensor may hold them: NaN for these heads, nothing read, others unchanged."""
    q, k, v = make_inputs(1, SMALL, 20, 70, 64, dtype=torch.bfloat16)
    inputs = attention_call(q, k, v, SMALL, causal=True)
    call = make_call(inputs, head_map=torch.tensor([1, -1, 3], dtype=torch.int32))
    result = phase_for(inputs).run(call)
    assert result.out[:, 1:].isnan().all() and result.lse[:, 1:].isnan().all()
    result.out[:, 1:], result.lse[:, 1:] = 0.0, 0.0  # then as if there were one head
    one = attention_call(q[:, :1], k, v, HeadMap([1], num_kv_heads=3), causal=True)
    check(one, Result(result.out[:, :1], result.lse[:, :1]))


def paged_inputs(lengths: list[int], q_len: int = 33, head_dim: int = 64, **options):
    q, k, v = make_inputs(len(lengths), SMALL, q_len, max(lengths), head_dim, dtype=torch.bfloat16)
    kv_lengths = torch.tensor([[length] * SMALL.num_kv_heads for length in lengths])
    return attention_call(q, k, v, SMALL, causal=True, kv_lengths=kv_lengths, **options)


@pytest.mark.parametrize(
    "page_size, head_dim, options",
    [
        (16, 64, {}),
        (48, 128, {}),
        (32, 256, {}),
        (7, 64, {"softcap": 3.0}),
        pytest.param(1, 64, {}, marks=pytest.mark.slow),
        pytest.param(5, 128, {"softcap": 3.0}, marks=pytest.mark.slow),
        pytest.param(100, 256, {"softcap": 3.0}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_paged(page_size: int, head_dim: int, options: dict, packed: bool):
    """Whole blocks and partial ones, pages of any size."""
    lengths = [150, 41, 128]
    inputs = paged_inputs(lengths, head_dim=head_dim, **options)
    check(inputs, phase_for(inputs).run(paged(inputs, page_size, lengths, packed)))


@pytest.mark.parametrize("missing", [0, 2, 5])
def test_a_page_that_is_not_in_storage(missing: int):
    """NaN for the rows that see its keys, and for them only."""
    lengths, page_size, q_len = [90, 41], 16, 33
    inputs = paged_inputs(lengths, q_len)
    call = paged(inputs, page_size, lengths)
    call.tensors["page_table"][0, :, missing] = NEVER
    result = phase_for(inputs).run(call)
    hidden = max(0, missing * page_size - (lengths[0] - q_len))  # tokens before that page's keys
    assert result.out[0, :, hidden:].isnan().all()
    assert result.out[0, :, :hidden].isfinite().all() and result.out[1].isfinite().all()


def test_rows_of_pages_too_far_apart_for_32_bits():
    """They are copied row by row. (The limit is 64 GB; here it is a few rows.)"""
    lengths = [150, 128]
    limit = ("warp_pages.cuh", "distance < kNone", "distance < 500")
    phase = Phase("sm80", "prefill", ("launch", "bf16_d64"), (limit,))
    inputs = paged_inputs(lengths)
    check(inputs, phase.run(paged(inputs, 16, lengths)))


def test_pages_are_looked_up_once_for_a_key():
    """By a warp for each row that it copies, a block ahead: 4 bytes a key in a tile of queries."""
    q_len, kv_len = 128, 320
    inputs = paged_inputs([kv_len], q_len)
    report = phase_for(inputs).run(paged(inputs, 16, [kv_len])).reports[0]
    ids = [s for s in report.memory_sites if s["kind"] == "global" and "cp.async.ca" in s["where"]]
    assert sum(s["bytes"] for s in ids) == (kv_len - 64) * 4 * SMALL.num_heads
    assert report.bank_conflicts == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new",
    [
        pytest.param("next = key + C::kBlockN", "next = key", id="pages-of-the-same-block"),
        pytest.param("page < rows.num_pages &&", "", id="pages-out-of-storage-let-through"),
        pytest.param(
            "params.k_stride.s : params.v_stride.s", "params.k_stride.s : params.k_stride.s",
            id="strides-of-k-for-v",
        ),
    ],
)  # fmt: skip
def test_broken_page_look_ups_are_noticed(old: str, new: str):
    lengths = [150, 200]
    phase = Phase("sm80", "prefill", ("launch", "bf16_d64"), (("warp_pages.cuh", old, new),))
    inputs = paged_inputs(lengths)
    with pytest.raises((AssertionError, PtxError)):
        call = paged(inputs, 16, lengths, packed=False)
        check(inputs, phase.run(call))
        call.tensors["page_table"][0, :, 2] = NEVER
        assert phase.run(call).out[0].isnan().all()


def test_packed_sequences():
    """Queries by offsets, keys from their first slots on; a sequence without queries, one without
    keys."""
    q_offsets = torch.tensor([0, 150, 150, 161, 200], dtype=torch.int32)
    k_offsets = torch.tensor([0, 77, 90, 90, 200], dtype=torch.int32)
    q, k, v = make_inputs(1, SMALL, 200, 200, 64, dtype=torch.bfloat16)
    lengths = k_offsets.diff()[:, None].expand(4, 3)
    inputs = attention_call(q, k, v, SMALL, causal=True)
    call = make_call(
        inputs.replace(kv_lengths=lengths), batch=4, max_q_len=150, q_offsets=q_offsets,
        page_table=torch.zeros(4, 3, 1, dtype=torch.int32), kv_begin=k_offsets[:-1].contiguous(),
    )  # fmt: skip
    result = phase_for(inputs).run(call)
    for b in range(4):
        tokens = slice(int(q_offsets[b]), int(q_offsets[b + 1]))
        keys = slice(int(k_offsets[b]), int(k_offsets[b + 1]))
        part = inputs.replace(q=q[:, :, tokens], k=k[:, :, keys], v=v[:, :, keys])
        if part.q_len:
            check(part, Result(result.out[:, :, tokens], result.lse[:, :, tokens]))


@pytest.mark.parametrize(
    "head_dim, dtype", [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]
)
def test_main_loop_counters(head_dim: int, dtype: torch.dtype):
    """No bank conflicts, whole sectors, K and V read once per tile of rows, products as few as can
    be."""
    q_len, kv_len = 256, 256
    report = attend(HeadMap([0]), q_len, kv_len, head_dim, dtype).reports[0]
    assert report.bank_conflicts == 0
    copies = [s for s in report.memory_sites if s["kind"] == "global" and "cp.async" in s["where"]]
    row_tiles = q_len // 128
    minimum = (row_tiles * 2 * kv_len + q_len) * head_dim * 2
    assert sum(s["bytes"] for s in copies) == minimum
    assert 32 * sum(s["sectors"] for s in copies) == minimum
    assert report.classes["mma"] == 2 * q_len * kv_len * head_dim // (16 * 8 * 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim, file, old, new",
    [
        pytest.param(*broken, id=name)
        for name, *broken in (
            ("wait-short", 64, "kernel.cuh", "cp_async_wait<1>();", "cp_async_wait<2>();"),
            ("no-barrier-before-v", 64, "kernel.cuh", "__syncthreads();  // V;", "//"),
            ("no-barrier-before-k", 64, "kernel.cuh", "__syncthreads();  // K;", "//"),
            ("no-barrier-after-q", 256, "kernel.cuh", "__syncthreads();  // Q is read", "//"),
            ("no-barrier-before-output", 256, "store.cuh", "__syncthreads();", ""),
            ("too-many-keys", 64, "load.cuh", "in_dim && key + i * kRows < length", "in_dim"),
            ("sums-not-rescaled", 64, "scores.cuh", "sum[m][h] *= factor;", ""),
            ("edge-not-masked", 64, "kernel.cuh", "hide_keys<C>(", "if (false) hide_keys<C>("),
        )
    ],
)
def test_broken_kernels_are_noticed(head_dim: int, file: str, old: str, new: str):
    unit = f"bf16_d{head_dim}"
    broken = Phase("sm80", "prefill", ("launch", unit), ((file, old, new),))
    q, k, v = make_inputs(1, SMALL, 150, 330, head_dim, dtype=torch.bfloat16)
    lengths = torch.tensor([[329, 330, 330]])
    k *= GROWTH
    k[:, 0, 329:] = v[:, 0, 329:] = torch.nan
    inputs = attention_call(q, k, v, SMALL, causal=True, kv_lengths=lengths)
    check(inputs, emulate(phase_for(inputs), inputs))
    with pytest.raises((AssertionError, PtxError)):
        check(inputs, emulate(broken, inputs))
