"""The sm_80 backward kernels' compiled PTX, executed by the emulator with its checks on: bounds,
races, uninitialised shared memory, copies not waited for."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.testing import assert_gradients_close, make_inputs
from tests.cases.attention import PREFILL_CASES, Case
from tools.ptxsim import PtxError

from .compiled_units import unavailable_reason
from .cuda_backward import (
    Differentiated,
    Packed,
    check_gradients,
    differentiate,
    differentiate_packed,
    make_backward_call,
    phase_for,
)  # fmt: skip
from .cuda_cache import NEVER
from .cuda_harness import (
    Phase,
)
from .cuda_params import DTYPES
from .test_cuda_prefill_sm80 import SMALL

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=unavailable_reason() or "emulator present"
)

# Between them every option, an empty group, more heads than a warp has lanes, rows that no 16-byte
# copy takes, and every way of grouping V apart.
QUICK = {
    "bool-mask", "causal-more-queries-than-keys", "everything", "lengths-per-head",
    "map-large-group", "map-with-empty", "no-keys", "strided", "value-map-interleaved",
}  # fmt: skip


def run(
    head_map: HeadMap, q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype, seed: int = 0,
    **options,
) -> Differentiated:  # fmt: skip
    """Run and check one call."""
    q, k, v = make_inputs(
        1, head_map, q_len, kv_len, head_dim, value_head_map=options.get("value_head_map"),
        dtype=dtype,
    )  # fmt: skip
    found = differentiate(attention_call(q, k, v, head_map, **options), seed=seed)
    check_gradients(found, q, k, v, head_map, **options)
    return found


def run_case(case: Case, dtype: torch.dtype, layout: str = "bhsd") -> None:
    args, options = case.build(dtype, "cpu", layout)
    inputs = attention_call(*args, **options)
    check_gradients(differentiate(inputs, use_lse=len(case.id) % 2 == 0), *args, **options)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.id, marks=[] if c.id in QUICK else pytest.mark.slow)
        for c in PREFILL_CASES
    ],
)
def test_options(case: Case):
    run_case(case, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "window-both", "additive-mask", "dims-7-250"])
def test_options_in_fp16(name: str):
    (case,) = (c for c in PREFILL_CASES if c.id == name)
    run_case(case, torch.float16, "bshd")


def test_order_of_warps_does_not_matter():
    """Several blocks of keys and of tokens, several steps of each; the same bits in any order."""
    first, *others = (
        run(SMALL, 70, 150, 64, torch.bfloat16, seed=seed, causal=True).gradients
        for seed in (0, 1, 2)
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "head_dim, dtype, options",
    [
        (256, torch.bfloat16, {"causal": True}),
        pytest.param(72, torch.bfloat16, {"window": (40, 10)}, marks=pytest.mark.slow),
        pytest.param(
            200, torch.float16, {"value_head_map": HeadMap([0, 1, 1])}, marks=pytest.mark.slow
        ),
    ],
)
def test_head_dims(head_dim: int, dtype: torch.dtype, options: dict):
    run(SMALL, 20, 70, head_dim, dtype, **options)


def test_unused_slots_are_not_read():
    """NaN beyond the lengths; there dK and dV are zeros."""
    q, k, v = make_inputs(2, SMALL, 40, 150, 64, dtype=torch.bfloat16)
    lengths = torch.tensor([[7, 150, 64], [0, 65, 3]])
    options = {"causal": True, "kv_lengths": lengths}
    for b in range(2):
        for h in range(3):
            k[b, h, lengths[b, h] :] = v[b, h, lengths[b, h] :] = torch.nan
    found = differentiate(attention_call(q, k, v, SMALL, **options))
    # The tolerance rule multiplies what no key sees by 0.
    check_gradients(found, q, k.nan_to_num(), v.nan_to_num(), SMALL, **options)


@pytest.mark.parametrize(
    "head_dim, dtype, options",
    [
        (64, torch.bfloat16, {"causal": True}),
        pytest.param(
            64, torch.float16, {"value_head_map": HeadMap([0, 1, 1])}, marks=pytest.mark.slow
        ),
        pytest.param(128, torch.bfloat16, {"softcap": 2.0}, marks=pytest.mark.slow),
        pytest.param(256, torch.float16, {"causal": True}, marks=pytest.mark.slow),
    ],
)
def test_dropout(head_dim: int, dtype: torch.dtype, options: dict):
    """What dropout keeps is what the reference keeps for the same seed."""
    value_map = options.get("value_head_map")
    q, k, v = make_inputs(2, SMALL, 37, 41, head_dim, dtype=dtype, value_head_map=value_map)
    torch.manual_seed(1)
    inputs = attention_call(q, k, v, SMALL, dropout_p=0.3, **options).draw_dropout_seed()
    found = differentiate(inputs)
    given = {"dropout_p": 0.3, "dropout_seed": inputs.dropout_seed, **options}
    check_gradients(found, q, k, v, SMALL, **given)


PACKED = {
    "plain": {},
    "all": {
        "causal": True, "window": (30, None), "softcap": 2.0, "sinks": torch.tensor([-1, 0.5, 2]),
        "value_head_map": HeadMap([0, 1, 1]),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, head_dim", [("all", 64), pytest.param("plain", 128, marks=pytest.mark.slow)]
)
def test_packed_sequences(name: str, head_dim: int):
    """One without queries, one without keys; NaN in tokens of no sequence, and no gradient."""
    options = PACKED[name]
    q, k, v = make_inputs(
        1, SMALL, 120, 230, head_dim, dtype=torch.bfloat16,
        value_head_map=options.get("value_head_map"),
    )  # fmt: skip
    q[:, :, 117:] = k[:, :, 224:] = v[:, :, 224:] = torch.nan
    inputs = attention_call(q, k, v, SMALL, **options)
    if name == "all":
        slopes = torch.rand((4, 3), generator=torch.Generator().manual_seed(0))
        inputs = inputs.replace(alibi_slopes=slopes)
    packed = Packed(inputs, [0, 37, 37, 48, 117], [0, 77, 91, 91, 224])
    found = differentiate_packed(packed)
    for b in (0, 2, 3):
        rows, keys = packed.tokens(b)
        of_sequence = {n: x for n, x in options.items() if n != "sinks"}
        gradients = {
            n: found.gradients[n][:, :, keys if n in "kv" else rows] for n in ("q", "k", "v")
        }
        if name == "all":
            of_sequence |= {"alibi_slopes": slopes[b], "sinks": options["sinks"]}
            gradients["alibi_slopes"] = found.gradients["alibi_slopes"][b]
        part = packed.sequence(b)
        assert_gradients_close(
            gradients, part.q, part.k, part.v, SMALL, dout=found.dout[:, :, rows],
            dlse=found.dlse[:, :, rows], **of_sequence,
        )  # fmt: skip
    for n, end in (("q", 117), ("k", 224), ("v", 224)):
        assert not found.gradients[n][:, :, end:].any()
    assert not found.gradients["k"][:, :, 77:91].any()  # no query sees them
    if name == "all":
        check_sinks(packed, found)


def check_sinks(packed: Packed, found: Differentiated) -> None:
    """Their gradient is a sum over all sequences: that of one call with them as a mask."""
    inputs, end = packed.inputs, (packed.q_offsets[-1], packed.k_offsets[-1])
    mask = torch.full((1, 3, *end), -torch.inf)
    for b in range(packed.batch):
        rows, keys = packed.tokens(b)
        n = keys.stop - keys.start
        position = torch.arange(rows.start, rows.stop) - rows.stop + n
        distance = position[:, None] - torch.arange(n)
        bias = -inputs.alibi_slopes[b, :, None, None] * distance.abs()
        seen = (distance >= 0) & (distance <= inputs.options.window_left)
        mask[0, :, rows, keys] = bias.masked_fill(~seen, -torch.inf)
    q, k, v = inputs.q[:, :, : end[0]], inputs.k[:, :, : end[1]], inputs.v[:, :, : end[1]]
    assert_gradients_close(
        {"sinks": found.gradients["sinks"]}, q, k, v, SMALL, dout=found.dout[:, :, : end[0]],
        dlse=found.dlse[:, :, : end[0]], attn_mask=mask, softcap=inputs.options.softcap,
        sinks=inputs.sinks, value_head_map=inputs.value_head_map,
    )  # fmt: skip


@pytest.mark.parametrize("value_map", [None, [0, 0, 1]])
def test_invalid_map_entries(value_map: list[int] | None):
    """As a device tensor may hold them: NaN in dQ of these heads and nowhere else, nothing read."""
    value_map = None if value_map is None else HeadMap(value_map, num_kv_heads=3)
    q, k, v = make_inputs(1, SMALL, 20, 70, 64, dtype=torch.bfloat16, value_head_map=value_map)
    options = {"causal": True, "alibi_slopes": torch.rand(3), "sinks": torch.rand(3)}
    inputs = attention_call(q, k, v, SMALL, value_head_map=value_map, **options)
    found = differentiate(inputs, head_map=torch.tensor([1, -1, 3], dtype=torch.int32))
    assert found.gradients["q"][:, 1:].isnan().all()
    assert not found.gradients["sinks"][1:].any()
    assert not found.gradients["alibi_slopes"][:, 1:].any()
    # The rest as if there were one head.
    for name, x in found.gradients.items():
        found.gradients[name] = x[:1] if name == "sinks" else x if name in "kv" else x[:, :1]
    options = {name: x[:1] if x is not True else x for name, x in options.items()}
    one = {"value_head_map": HeadMap([0], num_kv_heads=3)} if value_map else {}
    found = replace(found, dout=found.dout[:, :1], dlse=found.dlse[:, :1])
    check_gradients(found, q[:, :1], k, v, HeadMap([1], num_kv_heads=3), **options, **one)


@pytest.mark.parametrize("seed, names", [(37, ("alibi_slopes", "sinks")), (12, ("sinks",))])
def test_gradients_of_one_slope_and_one_sink(seed: int, names: tuple[str, ...]):
    """Draws in which these were too wrong with the delta of the output, which is rounded."""
    one = HeadMap([0])
    q, k, v = make_inputs(1, one, 20, 70, 64, dtype=torch.bfloat16, seed=seed)
    drawn = torch.rand(2, 1, generator=torch.Generator().manual_seed(seed))
    options = dict(zip(("alibi_slopes", "sinks"), drawn, strict=True))
    options = {"causal": True, **{name: options[name] for name in names}}
    found = differentiate(attention_call(q, k, v, one, **options))
    check_gradients(found, q, k, v, one, **options)


def test_what_it_declines():
    q, k, v = make_inputs(1, SMALL, 3, 5, 16, dtype=torch.bfloat16)
    inputs = attention_call(q, k, v, SMALL)
    phase = phase_for(inputs)
    for field, value, reason in [
        ("dtype", DTYPES.index(torch.float32), "dtype must be bfloat16 or float16"),
        ("page_table", q.data_ptr(), "k and v must be dense or packed, not a cache"),
        ("kv_begin", q.data_ptr(), "k and v must be dense or packed, not a cache"),
        ("head_dim", 257, "D must be 1 to 256, got 257"),
        ("num_v_heads", 8193, "Hv must be at most 8192, got 8193"),
        ("kv_len", 1 << 31, "Sk + Sq must be below 2^31 - 1024, got 2147483651"),
        ("batch", NEVER * 1000, "the number of tiles must be below 2^31, got 3145728000"),
    ]:
        call = make_backward_call(inputs)
        assert not phase.unsupported(call)
        setattr(call.params.call, field, value)
        assert phase.unsupported(call) == reason


@pytest.mark.parametrize(
    "head_dim, dtype",
    [
        (64, torch.bfloat16),
        (128, torch.float16),
        pytest.param(256, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_main_loop_counters(head_dim: int, dtype: torch.dtype):
    """No bank conflicts, whole sectors, every tile read once per CTA, products as few as can be."""
    q_len, kv_len, heads = 128, 128, 2
    found = run(HeadMap([0] * heads), q_len, kv_len, head_dim, dtype)
    rows = 64 if head_dim == 256 else 128  # that a CTA owns
    row_bytes, kinds = head_dim * 2, {}
    for report in found.result.reports:
        assert report.bank_conflicts == 0
        copies = [
            s for s in report.memory_sites if s["kind"] == "global" and "cp.async" in s["where"]
        ]
        assert 32 * sum(s["sectors"] for s in copies) == sum(s["bytes"] for s in copies)
        products = report.classes.get("mma", 0) * 16 * 8 * 16 / (heads * q_len * kv_len * head_dim)
        name = report.kernel.split("(")[0].split("<")[0].rsplit("::", 1)[-1]
        kinds.setdefault(name, []).append((products, sum(s["bytes"] for s in copies)))
    numbers = 8 * heads * q_len  # of the tokens, bytes
    kv_ctas, q_ctas = kv_len // rows, heads * q_len // rows
    walked = kv_ctas * (2 * heads * q_len * row_bytes + numbers)
    both = (4, 2 * kv_len * row_bytes + walked)
    # At 256 dK and dV are summed apart: S twice, and V is not read for dV.
    apart = [(3, 2 * kv_len * row_bytes + walked), (2, kv_len * row_bytes + walked)]
    assert kinds["backward_kv_kernel"] == ([both] if head_dim < 256 else apart)
    of_q = (2 * heads * q_len + q_ctas * 2 * kv_len) * row_bytes
    assert kinds["backward_q_kernel"] == [(3, of_q)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new",
    [
        pytest.param(*broken, id=name)
        for name, *broken in (
            ("kv-wait-short", "kv_kernel.cuh", "cp_async_wait<0>();", "cp_async_wait<1>();"),
            ("kv-no-barrier", "kv_kernel.cuh", "__syncthreads();  // this", "//"),
            ("kv-no-barrier-in-a-head", "kv_kernel.cuh", "__syncthreads();  // the head", "//"),
            ("q-wait-short", "q_kernel.cuh", "cp_async_wait<0>();", "cp_async_wait<1>();"),
            ("q-no-barrier", "q_kernel.cuh", "__syncthreads();  // this", "//"),
            ("q-no-barrier-of-sums", "q_kernel.cuh", "__syncthreads();  // warp_sums", "//"),
            ("too-many-rows", "load.cuh", "valid ? at", "true ? at"),
            ("edge-not-masked", "kv_kernel.cuh", "if (!keys.all)", "if (false)"),
            ("delta-dropped", "gradients.cuh", "dp - numbers.delta", "dp"),
            ("cap-without-slope", "gradients.cuh", "fmaf(-tanh, tanh, 1.0f)", "1.0f"),
            ("lse-gradient-dropped", "row_stats.cu", "delta -= params.dlse[at]", "delta -= 0"),
            ("lse-gradient-not-in-sums", "q_kernel.cuh", "delta -= args.params", "args.params"),
            ("unseen-rows-kept", "row_stats.cu", "lse != minus_infinity()", "true"),
            ("a-head-skipped", "kv_walk.cuh", "step.head + 1)", "step.head + 2)"),
            ("tokens-cut-short", "kv_walk.cuh", "window_left + 1", "window_left"),
            ("groups-in-no-order", "kv_walk.cuh", "sizes[o] > size || ", ""),
            ("dropped-kept-in-dv", "gradients.cuh", "if (drops && !", "if (false && !"),
            (
                "dropped-in-tokens-alone",
                "gradients.cuh",
                "if (drops) dp_e = kept.at",
                "if (false) dp_e = kept.at",
            ),
            ("words-of-other-tokens", "dropout.cuh", "column % 2;", "column / 2 % 2;"),
        )
    ],
)
def test_broken_kernels_are_noticed(file: str, old: str, new: str):
    differentiate_and_check(None)
    broken = Phase("sm80", "backward", ("launch", "row_stats", "bf16_d64"), ((file, old, new),))
    with pytest.raises((AssertionError, PtxError)):
        differentiate_and_check(broken)


@lru_cache
def differentiate_and_check(phase: Phase | None) -> None:
    """Calls in which each of these faults must show."""
    head_map = HeadMap([1, 0, 1])
    q, k, v = make_inputs(1, head_map, 70, 150, 64, dtype=torch.bfloat16)
    q_more = torch.cat([q, q, q], 2)[:, :, :200]  # more tokens than keys: some see none
    lengths = {"causal": True, "window": (60, None), "kv_lengths": torch.tensor([[149, 150]])}
    general = {
        "causal": True, "softcap": 2.0, "alibi_slopes": torch.rand(3),
        "value_head_map": HeadMap([0, 0, 1]),
    }  # fmt: skip
    drops = {"causal": True, "dropout_p": 0.4}
    narrow = {"causal": True, "window": (17, None)}  # token 64, alone in its block, sees key 127
    calls = [(q, general), (q, lengths), (q_more, lengths), (q, narrow), (q, drops)]
    for queries, options in calls:
        keys, values = k.clone(), v.clone()
        if "kv_lengths" in options:
            keys[:, 0, 149:] = values[:, 0, 149:] = torch.nan
        inputs = attention_call(queries, keys, values, head_map, **options)
        inputs = inputs.draw_dropout_seed()
        found = differentiate(inputs, phase=phase)
        check_gradients(found, queries, k, v, head_map, dropout_seed=inputs.dropout_seed, **options)
