"""The Hopper prefill kernel's compiled PTX (TMA, wgmma, mbarriers), executed by the emulator with
its checks on: bounds, races, uninitialised shared memory, copies and products not waited for."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.attention import attention_call
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.testing import make_inputs
from tests.cases.attention import PREFILL_CASES, WITH_EMPTY, Case
from tools.ptxsim import PtxError

from .compiled_units import unavailable_reason
from .cuda_harness import (
    CSRC,
    Phase,
    Result,
    check,
    compiled,
    emulate,
    make_call,
    toolkit,
)

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None, reason=unavailable_reason() or "emulator present"
)

SMALL = HeadMap([1, 0, 1], num_kv_heads=3)  # interleaved, with an empty group
UNITS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HOST = ("launch", "tensor_map")
QUICK = {"everything", "no-keys", "value-map-more-heads"}
SLOW = pytest.mark.slow
HEAD_DIMS = [64, pytest.param(128, marks=SLOW), pytest.param(256, marks=SLOW)]


def phase_for(inputs: AttentionCall) -> Phase:
    dim = max(inputs.head_dim, inputs.value_head_dim)
    head_dim_class = next(d for d in (64, 128, 256) if dim <= d)
    return compiled("sm90", "prefill", *HOST, f"{UNITS[inputs.dtype]}_d{head_dim_class}")


def attend(
    head_map: HeadMap, q_len: int, kv_len: int, head_dim: int = 64, dtype=torch.bfloat16,
    batch: int = 1, num_sms: int = 2, value_head_dim: int | None = None, seed: int = 0, **options,
) -> Result:  # fmt: skip
    """Run and check one call."""
    q, k, v = make_inputs(
        batch, head_map, q_len, kv_len, head_dim, dtype=dtype, value_head_dim=value_head_dim
    )
    inputs = attention_call(q, k, v, head_map, **options)
    result = emulate(phase_for(inputs), inputs, num_sms, seed=seed)
    check(inputs, result)
    return result


def reason(inputs: AttentionCall, **more) -> str:
    return phase_for(inputs).unsupported(make_call(inputs, **more))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id, marks=[] if c.id in QUICK else SLOW) for c in PREFILL_CASES]
)
def test_options(case: Case):
    (q, k, v, head_map), options = case.build(torch.bfloat16, "cpu")
    inputs = attention_call(q, k, v, head_map, **options)
    if not reason(inputs):
        check(inputs, emulate(phase_for(inputs), inputs))
    else:  # the only cases that TMA can't address
        assert case.id == "strided" or case.id.startswith("dims-"), reason(inputs)
        assert "TMA" in reason(inputs)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_order_of_warps_does_not_matter(head_dim: int):
    """Several tiles per CTA, drawn from the counter; more blocks of keys than stages."""
    first, *others = (
        attend(SMALL, 260, 390, head_dim, causal=True, seed=seed).out for seed in range(3)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "head_dim, value_head_dim, dtype, options",
    [
        (128, 128, torch.bfloat16, {}),  # the wider blocks of keys
        (128, 128, torch.bfloat16, {"causal": True}),
        (200, 256, torch.float16, {"causal": True}),
        pytest.param(64, 40, torch.float16, {}, marks=SLOW),
        pytest.param(128, 128, torch.float16, {}, marks=SLOW),
        pytest.param(8, 104, torch.float16, {"window": (70, 20)}, marks=SLOW),
        pytest.param(256, 256, torch.bfloat16, {"softcap": 3.0}, marks=SLOW),
        pytest.param(192, 128, torch.bfloat16, {"window": (90, 0)}, marks=SLOW),
    ],
)
def test_head_dims(head_dim: int, value_head_dim: int, dtype: torch.dtype, options: dict):
    attend(HeadMap([1, 0]), 131, 369, head_dim, dtype, value_head_dim=value_head_dim, **options)


@pytest.mark.parametrize("q_len, kv_len", [(1, 129), (193, 70)])
def test_lengths_around_tiles(q_len: int, kv_len: int):
    """More queries than keys leave rows, and whole tiles, that see nothing."""
    attend(HeadMap([0, 0]), q_len, kv_len, batch=2, num_sms=3, causal=True)


def test_large_scores_rescale_the_output():
    """Maxima that grow from block to block, as rescaling on demand must notice, and fall again."""
    q, k, v = make_inputs(1, SMALL, 130, 640, 64, dtype=torch.bfloat16)
    k *= torch.tensor([1, 64, 16, 4, 32]).repeat_interleave(128)[:, None]
    inputs = attention_call(q, k, v, SMALL)
    check(inputs, emulate(phase_for(inputs), inputs))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_unused_slots_do_not_matter(head_dim: int):
    """NaN behind each head's own length, inside blocks that are loaded whole."""
    q, k, v = make_inputs(2, SMALL, 40, 300, head_dim, dtype=torch.bfloat16)
    lengths = torch.tensor([[7, 300, 64], [0, 130, 256]])
    for b in range(2):
        for h in range(3):
            k[b, h, lengths[b, h] :] = v[b, h, lengths[b, h] :] = torch.nan
    inputs = attention_call(q, k, v, SMALL, causal=True, kv_lengths=lengths)
    check(inputs, emulate(phase_for(inputs), inputs))


def test_cache_views():
    """K and V in one packed cache of more sequences than are read, left padded."""
    q, k, v = make_inputs(2, SMALL, 70, 200, 64, dtype=torch.bfloat16, layout="bshd")
    begin = torch.tensor([3, 77], dtype=torch.int32)
    lengths = torch.tensor([[190] * 3, [123] * 3])
    pages = torch.tensor([3, 1], dtype=torch.int32)
    cache = torch.full((4, 200, 3, 128), torch.nan, dtype=torch.bfloat16)
    expected = attention_call(q, k, v, SMALL, causal=True, kv_lengths=lengths, layout="bshd")
    for b in range(2):
        n, first = int(lengths[b, 0]), int(begin[b])
        cache[pages[b], first : first + n, :, :64] = k[b, :n]
        cache[pages[b], first : first + n, :, 64:] = v[b, :n]
    cache = cache.transpose(1, 2)
    inputs = expected.replace(k=cache[..., :64], v=cache[..., 64:])
    table = pages[:, None, None].expand(2, 3, 1)
    call = make_call(inputs, page_table=table, kv_begin=begin, batch=2)
    check(expected, phase_for(inputs).run(call))
    # A sequence whose page is not in storage is NaN; the other one is unchanged.
    table = torch.tensor([4, 1], dtype=torch.int32)[:, None, None].expand(2, 3, 1)
    result = phase_for(inputs).run(make_call(inputs, page_table=table, kv_begin=begin, batch=2))
    assert result.out[0].isnan().all() and result.lse[0].isnan().all()
    assert torch.equal(result.out[1], call.out[1])


def test_invalid_map_entries():
    """As a device tensor may hold them: NaN for these heads, nothing read, others unchanged."""
    q, k, v = make_inputs(1, SMALL, 20, 70, 64, dtype=torch.bfloat16)
    inputs = attention_call(q, k, v, SMALL, causal=True)
    call = make_call(inputs, head_map=torch.tensor([-1, 0, 3], dtype=torch.int32))
    result = phase_for(inputs).run(call)
    for h in (0, 2):
        assert result.out[:, h].isnan().all() and result.lse[:, h].isnan().all()
    one = attention_call(q[:, 1:2], k, v, HeadMap([0], num_kv_heads=3), causal=True)
    check(one, Result(result.out[:, 1:2], result.lse[:, 1:2]))


@SLOW
def test_sections_of_tiles():
    """Long K and V are cut into sections that fit in L2; here into sections of a few bytes."""
    small = ("sm90/prefill/launch.cu", "kSectionBytes = int64_t{32} << 20", "kSectionBytes = 1")
    phase = Phase("sm90", "prefill", (*HOST, "bf16_d64"), (small,))
    head_map = HeadMap([1, 0, 1, 0, 0], num_kv_heads=2)  # sections of two heads of five
    for options in ({"causal": True}, {}):
        q, k, v = make_inputs(1, head_map, 400, 20, 64, dtype=torch.bfloat16)
        inputs = attention_call(q, k, v, head_map, **options)
        check(inputs, emulate(phase, inputs))


def test_what_is_declined():
    q, k, v = make_inputs(1, SMALL, 8, 8, 64, dtype=torch.bfloat16)
    inputs = attention_call(q, k, v, SMALL)
    assert reason(inputs) == ""
    room = torch.zeros(1, 3, 8, 68, dtype=torch.bfloat16)
    assert reason(inputs.replace(k=room[..., :64])) == (
        "k's sequence stride must be a positive multiple of 16 bytes below 2^40 for TMA, got 136 "
        "bytes"
    )
    assert "v must begin at a multiple of 16 bytes" in reason(inputs.replace(v=room[..., 1:65]))
    assert "batch stride" in reason(
        inputs.replace(q=q.expand(2, -1, -1, -1), k=k.expand(2, -1, -1, -1))
    )
    table = torch.zeros(1, 3, 2, dtype=torch.int32)
    assert reason(inputs, page_table=table) == ""
    begin = torch.zeros(1, dtype=torch.int32)
    assert reason(inputs, page_table=table, kv_begin=begin) == (
        "sequences of several pages must begin at their start"
    )
    assert reason(inputs.replace(k=k[:, :, :4], v=v[:, :, :4]), page_table=table) == (
        "page_size must be a multiple of 8, got 4"
    )
    offsets = torch.tensor([0, 8], dtype=torch.int32)
    assert reason(inputs, q_offsets=offsets) == ""
    masked = inputs.replace(attn_mask=torch.ones(1, 3, 8, 8, dtype=torch.bool))
    assert reason(masked, q_offsets=offsets) == (
        "attn_mask must not be given with packed sequences"
    )
    dropping = inputs.replace(dropout_p=0.5).draw_dropout_seed()
    assert reason(dropping) == "dropout_p must be 0"
    call = make_call(inputs)
    call.params.num_heads = 513
    assert phase_for(inputs).unsupported(call) == "Hq must be at most 512, got 513"
    error = ctypes.create_string_buffer(200)
    library = phase_for(inputs)._library
    assert library.gqa_run(ctypes.byref(call.params), None, 4, error, 200) == 1
    assert error.value == b"sm90 prefill: Hq must be at most 512, got 513"


@pytest.mark.parametrize("head_dim, block_n, block_m", [(64, 128, 192), (128, 176, 128)])
def test_main_loop_counters(head_dim: int, block_n: int, block_m: int):
    """No bank conflicts; TMA moves Q once and K and V once per tile; products as few as can be."""
    q_len, kv_len = 2 * block_m, 3 * block_n
    report = attend(HeadMap([0]), q_len, kv_len, head_dim).reports[0]
    assert report.bank_conflicts == 0
    assert report.tma_bytes_loaded == (q_len + 2 * 2 * kv_len) * head_dim * 2
    assert report.tma_bytes_stored == q_len * head_dim * 2
    assert report.tensor_flops == 4 * q_len * kv_len * head_dim


def triton_tool(name: str) -> Path | None:
    """A disassembler that comes with Triton."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return tool if tool.exists() else None


@pytest.mark.parametrize("unit", ["bf16_d64", pytest.param("bf16_d128", marks=SLOW),
                                  pytest.param("fp16_d256", marks=SLOW)])  # fmt: skip
def test_softmax_overlaps_with_products_in_machine_code(unit: str, tmp_path: Path):
    """ptxas may hoist the wait for P V above the softmax that is to overlap with it, and may
    serialise products; it says so of the latter only."""
    cuobjdump = triton_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("this Triton comes without cuobjdump")
    cubin = tmp_path / "unit.cubin"
    source = CSRC / "cuda/sm90/prefill/instantiations" / f"{unit}.cu"
    built = subprocess.run(
        [toolkit().nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-gencode",
         "arch=compute_90a,code=sm_90a", source, "-o", cubin],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "serialized" not in built.stderr
    assert set(re.findall(r"(\d+) bytes spill", built.stderr)) == {"0"}
    listing = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True).stdout
    kernels = re.split(r"\n\s*Function : ", listing)[1:]
    assert kernels
    for kernel in kernels:
        block_n = int(re.search(r"ConfigILi\d+ELi(\d+)", kernel)[1])
        code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", kernel)
        begin = next(i for i, op in enumerate(code) if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in op)
        end = next(i for i in range(begin, len(code)) if "DEPBAR.LE gsb0, 0x0" in code[i])
        # Exponentials of two rows, and their rescale factors (softcap has more).
        assert sum("MUFU.EX2" in op for op in code[begin:end]) >= block_n // 2 + 2


BROKEN = {
    "K released before the product has read it": (
        "consumer.cuh", "release(k_ring.empty(n));\n        soften", "soften"),
    "K released early": (
        "consumer.cuh", "wgmma_wait<1>();\n        pin(s);\n        release(k_ring.empty(n));",
        "release(k_ring.empty(n));\n        wgmma_wait<1>();\n        pin(s);"),
    "V released early": (
        "consumer.cuh", "wgmma_wait<0>();\n        pin(o);\n        release(v_ring.empty(n - 1));",
        "release(v_ring.empty(n - 1));\n        wgmma_wait<0>();\n        pin(o);"),
    "V not waited for": (
        "consumer.cuh", "v_ring.wait_full(n, fminf(softmax.sum[0], softmax.sum[1]) < 0.0f);", ""),
    "products not waited for": ("consumer.cuh", "wgmma_wait<1>();\n        pin(s);", "pin(s);"),
    "buffers not waited for": ("producer.cuh", "ring.wait_empty(n);", ""),
    "Q not waited for": ("producer.cuh", "q_ring.wait_empty(round);\n        mbar", "mbar"),
    "turn not passed": ("consumer.cuh", "pass_turn();\n        wgmma", "wgmma"),
    "tail of V not cleared": ("consumer.cuh", "if (tile.dirty_tail) {", "if (false) {"),
    "tail cleared without a barrier": (
        "consumer.cuh", "named_barrier_sync(kTailBarrier, C::kThreads - 128);", ""),
    "keys of edge blocks not hidden": ("consumer.cuh", "if (ends || begins)", "if (false)"),
    "one key too many": ("scores.cuh", "if (8 * j >= end)", "if (8 * j > end)"),
    "never rescaled": ("consumer.cuh", "if (__any_sync(~0u", "if (!__any_sync(~0u"),
    "no fence before the store": (
        "epilogue.cuh", "fence_async_proxy();\n  named_barrier_sync(barrier, 128);",
        "named_barrier_sync(barrier, 128);"),
    "O overwritten while it leaves": ("epilogue.cuh", "if (storer) tma_store_wait_read();", ""),
    "store not waited for": ("consumer.cuh", "if (threadIdx.x % 128 == 0) tma_store_wait();", ""),
}  # fmt: skip


@SLOW
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_noticed(name: str):
    file, old, new = BROKEN[name]
    broken = Phase("sm90", "prefill", (*HOST, "bf16_d64"), ((f"sm90/prefill/{file}", old, new),))

    def run(q_len: int, kv_len: int) -> None:
        q, k, v = make_inputs(1, WITH_EMPTY, q_len, kv_len, 64, dtype=torch.bfloat16)
        lengths = torch.full((1, WITH_EMPTY.num_kv_heads), kv_len - 5)
        k[:, :, -5:] = v[:, :, -5:] = torch.nan
        k[:, :, 200:300] *= 8
        inputs = attention_call(q, k, v, WITH_EMPTY, causal=True, kv_lengths=lengths)
        check(inputs, emulate(broken, inputs, num_sms=2))

    with pytest.raises((AssertionError, PtxError)):
        run(400, 530)
        run(70, 90)  # a block per tile: nothing but its own barrier guards the next Q
