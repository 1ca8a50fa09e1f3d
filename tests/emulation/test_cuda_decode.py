"""The sm_80 decode kernels' compiled PTX, launched by their own host code, in the emulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.testing import make_inputs
from tests.cases.attention import DECODE_CASES
from tests.emulation.compiled_units import unavailable_reason
from tests.emulation.cuda_harness import (
    Call,
    Phase,
    check,
    compiled,
    emulate,
    make_call,
)
from tools.ptxsim import PtxError

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

UNEVEN = HeadMap([1, 0, 1, 1], num_kv_heads=3)  # interleaved, with an empty group
BF16, FP16 = torch.bfloat16, torch.float16
MANY_SMS = 24  # enough for the host code to split


def decode_phase(dtype: torch.dtype, head_dim: int) -> Phase:
    dim_class = next(size for size in (64, 128, 256) if head_dim <= size)
    dtype_name = {BF16: "bf16", FP16: "fp16"}[dtype]
    return compiled("sm80", "decode", "launch", f"{dtype_name}_d{dim_class}")


def decode_inputs(
    head_map=UNEVEN, q_len=1, kv_len=200, head_dim=64, dtype=BF16, batch=2, seed=0, strided=False,
    layout="bhsd", value_head_dim=None, value_head_map=None, **options,
) -> AttentionCall:  # fmt: skip
    q, k, v = make_inputs(
        batch, head_map, q_len, kv_len, head_dim, value_head_dim=value_head_dim, dtype=dtype,
        value_head_map=value_head_map, strided=strided, layout=layout, seed=seed,
    )  # fmt: skip
    if value_head_map is not None:
        options["value_head_map"] = value_head_map
    return attention_call(q, k, v, head_map, layout=layout, **options)


def every_option(q_len: int, kv_len: int, num_heads: int, batch: int, mask_dtype) -> dict:
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    mask = random(batch, num_heads, q_len, kv_len)
    if mask_dtype == torch.bool:
        mask = mask > -1
    else:
        mask = mask.masked_fill(mask < -1, -torch.inf).to(mask_dtype)
    return {
        "window": (kv_len - 20, 3), "softcap": 3.0, "sinks": random(num_heads),
        "alibi_slopes": random(batch, num_heads).abs() / 8, "attn_mask": mask,
    }  # fmt: skip


CASES = {
    "plain": (decode_inputs(causal=True), 1),
    "split": (decode_inputs(kv_len=700, q_len=3, causal=True, seed=1), MANY_SMS),
    "interleaved-bshd": (
        decode_inputs(HeadMap([2, 0, 2, 0, 3, 2]), layout="bshd", kv_len=131, dtype=FP16), 1,
    ),
    "strided-elements": (decode_inputs(strided=True, head_dim=59, value_head_dim=33, kv_len=77), 1),
    "value-map": (
        decode_inputs(UNEVEN, value_head_map=HeadMap([0, 0, 1, 0]), q_len=2, kv_len=70), 1,
    ),
    "wide": (decode_inputs(batch=1, head_dim=112, value_head_dim=128, kv_len=260), MANY_SMS),
    "tile-overflow": (decode_inputs(HeadMap([0] * 19 + [1]), batch=1, kv_len=90), 1),
    "more-queries-than-keys": (decode_inputs(q_len=5, kv_len=3, causal=True), 1),
    "no-keys": (decode_inputs(kv_len=0, sinks=torch.randn(4)), 1),
    "lengths": (
        decode_inputs(
            kv_len=260, q_len=2, causal=True, sinks=torch.tensor([1.0, -2.0, 0.0, 3.0]),
            kv_lengths=torch.tensor([[0, 257, 9], [130, 64, 9]]),
        ), MANY_SMS,
    ),
    "lengths-per-sequence": (
        decode_inputs(
            kv_len=700, batch=5,
            kv_lengths=torch.tensor([3, 700, 0, 130, 64])[:, None].expand(5, 3),
        ), 2,
    ),
    "lengths-window": (
        decode_inputs(
            kv_len=500, q_len=2, batch=3, window=(200, 0),
            kv_lengths=torch.tensor([[500], [40], [333]]).expand(3, 3),
        ), 4,
    ),
    "window": (decode_inputs(kv_len=500, q_len=2, window=(300, 0)), MANY_SMS),
    "everything": (
        decode_inputs(q_len=3, kv_len=260, **every_option(3, 260, 4, 2, torch.float32)), MANY_SMS,
    ),
    "everything-fp16-bool": (
        decode_inputs(
            q_len=2, kv_len=90, dtype=FP16, batch=1, **every_option(2, 90, 4, 1, torch.bool)
        ), 1,
    ),
    "negative-scale": (decode_inputs(scale=-0.1, kv_len=90, batch=1), 1),
}  # fmt: skip
SLOW_CASES = {
    "d256": (decode_inputs(head_dim=256, value_head_dim=200, kv_len=180, batch=1), MANY_SMS),
    "d256-fp16": (decode_inputs(head_dim=200, kv_len=90, dtype=FP16, q_len=5, causal=True), 1),
    "d128-fp16": (decode_inputs(head_dim=128, kv_len=300, dtype=FP16, causal=True), MANY_SMS),
    "d128-everything": (
        decode_inputs(
            q_len=3, kv_len=200, head_dim=128, **every_option(3, 200, 4, 2, torch.bfloat16)
        ), MANY_SMS,
    ),
    "elements-split": (decode_inputs(head_dim=31, value_head_dim=9, kv_len=400), MANY_SMS),
    "more-heads-than-threads": (
        decode_inputs(HeadMap([i * i % 23 for i in range(150)], 23), batch=1, kv_len=20), 1,
    ),
    "many-heads": (decode_inputs(HeadMap([i % 7 for i in range(70)]), batch=1, kv_len=65), 1),
    "one-key-head-each": (decode_inputs(HeadMap(list(range(40))[::-1]), batch=1, kv_len=33), 1),
}  # fmt: skip


def run_case(inputs: AttentionCall, num_sms: int, seed: int = 0):
    phase = decode_phase(inputs.dtype, max(inputs.head_dim, inputs.value_head_dim))
    result = emulate(phase, inputs, num_sms, seed=seed)
    check(inputs, result)
    return result


@pytest.mark.parametrize("name", CASES)
def test_results_and_hazards(name):
    inputs, num_sms = CASES[name]
    result = run_case(inputs, num_sms)
    split = num_sms > 1 and inputs.k.shape[2] >= 256  # four blocks
    assert len(result.launches) == (2 if split else 1), result.launches


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_more_results_and_hazards(name):
    run_case(*SLOW_CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.id)
def test_the_cases_of_all_backends(case):
    for dtype in (BF16, FP16):
        args, options = case.build(dtype, "cpu")
        inputs = attention_call(*args, **options)
        check(inputs, emulate(decode_phase(dtype, 64), inputs, MANY_SMS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_other_schedules(name, seed):
    run_case(*CASES[name], seed=seed)


def test_invalid_map_entries_give_nan_and_leave_the_others():
    inputs = decode_inputs(HeadMap([1, 0, 1, 1, 0]), kv_len=140, causal=True)
    phase = decode_phase(BF16, 64)
    for num_sms, entries in ((1, [1, 2, 0, -1, 0]), (MANY_SMS, [1 << 30, 0, 1, 1, -(1 << 31)])):
        call = make_call(inputs, head_map=torch.tensor(entries, dtype=torch.int32))
        result = phase.run(call, num_sms)
        bad = torch.tensor([not 0 <= entry < 2 for entry in entries])
        assert result.out[:, bad].isnan().all() and result.lse[:, bad].isnan().all()
        good = ~bad
        valid = HeadMap([entry for entry in entries if 0 <= entry < 2], num_kv_heads=2)
        result = replace(result, out=result.out[:, good], lse=result.lse[:, good])
        check(inputs.replace(q=inputs.q[:, good], head_map=valid), result)


def paged(inputs: AttentionCall, page_size: int, begin: list[int] | None = None) -> Call:
    """The call with K and V in shuffled pages; NaN in unused slots, garbage in unused entries."""
    lengths = inputs.kv.kv_lengths
    batch, heads, slots, _ = inputs.k.shape
    begin = begin or [0] * batch
    pages = -(-(slots + max(begin)) // page_size)
    order = torch.randperm(batch * heads * pages, generator=torch.Generator().manual_seed(3))
    table = torch.full((batch, heads, pages), 1 << 29, dtype=torch.int32)
    storage = [
        torch.full((batch * heads * pages, page_size, x.shape[3]), torch.nan, dtype=x.dtype)
        for x in (inputs.k, inputs.v)
    ]
    free = iter(order.tolist())
    for b in range(batch):
        for h in range(heads):
            for j in range(int(lengths[b, h])):
                page, slot = divmod(begin[b] + j, page_size)
                if table[b, h, page] == 1 << 29:
                    table[b, h, page] = next(free)
                for to, x in zip(storage, (inputs.k, inputs.v), strict=True):
                    to[table[b, h, page], slot] = x[b, h, j]
    # A page of the pool belongs to one head: the head stride is 0.
    k, v = (x[:, None].expand(-1, heads, -1, -1) for x in storage)
    begins = torch.tensor(begin, dtype=torch.int32) if any(begin) else None
    return make_call(inputs.replace(k=k, v=v), page_table=table, kv_begin=begins)


@pytest.mark.parametrize("page_size, num_sms", [(16, MANY_SMS), (7, 1), (1, 1)])
def test_pages(page_size, num_sms):
    """Any page size, a table per head, sequences that begin in the middle of a page."""
    inputs = decode_inputs(
        kv_len=150, q_len=2, causal=True, kv_lengths=torch.tensor([[149, 3, 0], [17, 150, 0]])
    )
    result = decode_phase(BF16, 64).run(paged(inputs, page_size, begin=[0, 5]), num_sms)
    check(inputs, result)


def test_page_outside_the_storage_poisons_the_rows_that_see_it():
    inputs = decode_inputs(
        kv_len=90, q_len=2, window=(20, 0), batch=1, kv_lengths=torch.tensor([[90, 90, 90]])
    )
    for bad in (-1, 1 << 20):
        # Key head 1: the page of keys 64 to 79 is seen by both tokens; that of keys 32 to 47 not.
        call = paged(inputs, 16)
        call.tensors["page_table"][0, 1, 4] = bad
        call.tensors["page_table"][0, 0, 2] = bad
        result = decode_phase(BF16, 64).run(call)
        assert result.out[:, [0, 2, 3]].isnan().all() and result.lse[:, [0, 2, 3]].isnan().all()
        untouched = inputs.replace(q=inputs.q[:, 1:2], head_map=HeadMap([0], num_kv_heads=3))
        check(untouched, replace(result, out=result.out[:, 1:2], lse=result.lse[:, 1:2]))


def test_packed_queries():
    """Sequences of 3, 0 and 1 query tokens in one row, over a cache padded on the left."""
    counts, lengths, begin = [3, 0, 1], [40, 7, 70], [2, 0, 9]
    q, k, v = make_inputs(3, UNEVEN, 4, 80, 64, dtype=BF16)
    packed = attention_call(q[:1].contiguous(), k[:1], v[:1], UNEVEN, causal=True)
    packed = packed.replace(k=k, v=v, kv_lengths=torch.tensor(lengths).int()[:, None].expand(3, 3))
    call = make_call(
        packed, batch=3, max_q_len=3, kv_begin=torch.tensor(begin, dtype=torch.int32),
        q_offsets=torch.tensor([0, 3, 3, 4], dtype=torch.int32),
    )  # fmt: skip
    result = decode_phase(BF16, 64).run(call)
    first = 0
    for b, count in enumerate(counts):
        if not count:
            continue
        keys = slice(begin[b], begin[b] + lengths[b])
        tokens = slice(first, first + count)
        alone = attention_call(
            packed.q[:, :, tokens],
            k[b : b + 1, :, keys],
            v[b : b + 1, :, keys],
            UNEVEN,
            causal=True,
        )
        check(alone, replace(result, out=result.out[:, :, tokens], lse=result.lse[:, :, tokens]))
        first += count


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_byte_once_and_no_bank_conflicts(head_dim, page_size):
    """What a profiler would show of the main loop, counted on the uneven map of a long call."""
    head_map = HeadMap([0, 2, 0, 0, 2, 0, 0, 0], num_kv_heads=3)
    kv_len = 768 if head_dim == 64 else 512
    inputs = decode_inputs(
        head_map, kv_len=kv_len, head_dim=head_dim, batch=1,
        kv_lengths=torch.full((1, 3), kv_len) if page_size else None,
    )  # fmt: skip
    call = paged(inputs, page_size) if page_size else make_call(inputs)
    result = decode_phase(BF16, head_dim).run(call, num_sms=2)
    check(inputs, result)
    (report, *_) = result.reports
    assert "decode_kernel" in report.kernel and report.bank_conflicts == 0
    kv_bytes = 2 * 2 * kv_len * head_dim * 2  # used KV heads, K and V, 16 bits
    sites = [site for site in report.memory_sites if site["kind"] == "global"]
    sectors = sum(site["sectors"] for site in sites if "cp.async" in site["where"])
    assert sectors * 32 == kv_bytes  # each byte once, in full sectors
    reads = sum(site["sectors"] for site in sites if "st.global" not in site["where"])
    page_ids = 0 if not page_size else kv_bytes * 0.02  # looked up key by key, from L1
    assert 32 * reads <= 1.03 * kv_bytes + page_ids + 32 * 200  # map, Q


BREAKS = {
    "wait one group short": (
        "pipeline.cuh", "cp_async_wait<2 * C::kStages - 1>();", "cp_async_wait<2 * C::kStages>();",
    ),
    "one key too many": ("load.cuh", "mine < limit", "mine <= limit"),
    "no barrier after the tile is known": (
        "tile.cuh", "__syncthreads();  // the rows are known, the scratch is free", "",
    ),
    "no barrier after Q": ("kernel.cuh", "__syncthreads();  // Q is there", ""),
    "no barrier before the merge": (
        "merge_warps.cuh", "__syncthreads();  // every warp is past", "//",
    ),
    "no barrier before the sum": (
        "merge_warps.cuh", "__syncthreads();  // the outputs of all", "//",
    ),
    "V of the wrong head": (
        "copy_rows.cuh", "params.v_stride, b, k_head, v_head", "params.v_stride, b, k_head, k_head",
    ),
    "a split forgotten": ("combine.cuh", "s0 += 32) {", "s0 += 33) {"),
    "splits that overlap": (
        "tile.cuh", "tile.part.split * chunk", "tile.part.split * (chunk - 1)",
    ),
    "a sequence's parts where they are not": (
        "tile.cuh", "parts[2 * tile.part.b] = number", "parts[2 * tile.part.b] = 0",
    ),
    "no barrier after the blocks of warps": ("parts.cuh", "__syncthreads();  // warp_blocks", ""),
    "no barrier after the sums of warps": ("scan.cuh", "__syncthreads();  // warp_sums", ""),
    "a group's first head counted twice": (
        "group_rows.cuh", "__popc(same & below)", "__popc(same & (below << 1))",
    ),
    "no barrier after the keys": ("group_rows.cuh", "__syncthreads();  // keys", ""),
    "invalid entries let through": ("group_rows.cuh", "k_head >= num_k ||", ""),
}  # fmt: skip


@pytest.mark.parametrize("num_heads, most", [(32, 500), (128, 800)])
def test_the_search_for_a_tile_takes_as_long_for_many_groups_as_for_one(num_heads, most):
    """Instructions of a warp of the CTA that has the last group, beyond those of one head's CTA."""

    def executed(heads: int) -> int:
        head_map = HeadMap(list(range(heads)))
        inputs = decode_inputs(head_map, kv_len=1, batch=1)
        report = emulate(decode_phase(BF16, 64), inputs, 1, check=False).reports[0]
        return report.warp_instructions / (heads * 4)

    assert executed(num_heads) - executed(1) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_planted_errors_are_noticed(name):
    """A kernel broken in one place fails: by a wrong result, or by one of the emulator's checks."""
    phase = Phase("sm80", "decode", ("launch", "bf16_d64"), replace=(BREAKS[name],))
    calls = [
        (decode_inputs(kv_len=330, q_len=2, causal=True, sinks=torch.randn(4)), MANY_SMS),
        (decode_inputs(kv_len=70, value_head_map=HeadMap([0, 0, 1, 0])), 1),
        (decode_inputs(kv_len=4500, batch=1), 99),
        (
            decode_inputs(
                kv_len=400, batch=3, kv_lengths=torch.tensor([[64, 130, 9], [0, 1, 0], [9, 400, 9]])
            ),
            2,
        ),
    ]
    invalid = make_call(calls[1][0], head_map=torch.tensor([1, 3, 1, 1], dtype=torch.int32))
    with pytest.raises((AssertionError, PtxError)):
        for inputs, num_sms in calls:
            check(inputs, emulate(phase, inputs, num_sms))
        result = phase.run(invalid)
        assert result.out[:, 1].isnan().all()


def test_launches_follow_from_shapes_alone():
    """Whatever the map and the lengths: what CUDA graphs and maps on the device need."""
    seen = set()
    for entries in ([0] * 12, [2] * 12, [0, 1, 2] * 4):
        inputs = decode_inputs(HeadMap(entries, 3), kv_len=130, batch=1)
        seen.add(str(emulate(decode_phase(BF16, 64), inputs, MANY_SMS, check=False).launches))
    assert len(seen) == 1
    for lengths in ([0, 0], [300, 300], [300, 1]):
        kv_lengths = torch.tensor(lengths)[:, None].expand(2, 3)
        inputs = decode_inputs(kv_len=300, kv_lengths=kv_lengths)
        seen.add(str(emulate(decode_phase(BF16, 64), inputs, 2, check=False).launches))
    assert len(seen) == 2


def test_one_long_sequence_is_cut_and_short_ones_are_not():
    """Three CTAs run at once, so that 23 blocks are cut into parts of up to 4."""
    lengths = [64, 64, 64, 1280]
    inputs = decode_inputs(
        HeadMap([0, 0]), kv_len=1280, batch=4, kv_lengths=torch.tensor(lengths)[:, None]
    )
    result = emulate(decode_phase(BF16, 64), inputs, 1)
    check(inputs, result)
    (_, grid, _), _ = result.launches
    # At most one part more of each sequence than without rounding; two tiles, of any map.
    assert grid == ((2 * 3 + 4) * 2, 1, 1)


def test_host_code_says_what_it_cannot_run():
    inputs = decode_inputs(kv_len=5)
    phase = decode_phase(BF16, 64)
    for name, value, reason in [
        ("dtype", 0, "dtype must be bfloat16 or float16"),
        ("k_dtype", 6, "k and v must have q's dtype or one quantised dtype"),
        ("head_dim", 257, "D must be 1 to 256, got 257"),
        ("value_head_dim", 300, "Dv must be 1 to 256, got 300"),
        ("num_heads", 9000, "Hq must be at most 8192, got 9000"),
        ("dropout_threshold", 1, "dropout_p must be 0"),
        ("kv_len", (1 << 31) - 500, "Sk + Sq must be below 2^31 - 1024, got 2147483149"),
    ]:
        call = make_call(inputs)
        assert phase.unsupported(call) == ""
        setattr(call.params, name, value)
        assert phase.unsupported(call) == reason
