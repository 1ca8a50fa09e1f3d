"""Runs the compiled PTX of Triton launches: ``python -m tests.emulation.emulate ARCH [CASE ...]``

For each case named (default: all of them) the outputs are held to the package's tolerance rule, and
one JSON object of the emulator's counters per launch is printed. The emulator's own checks (bounds,
races, uninitialised shared memory, unawaited copies) are on and raise.

Environment: ``TRITON_INTERPRET`` must not be 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.reference.formula import reference_attention
from gqa_kernels.backends.triton.configs import Tile, decode_config, prefill_tile
from gqa_kernels.backends.triton.launch.base import Launch
from gqa_kernels.backends.triton.launch.forward import ForwardCall, decode_launches, prefill_launch
from gqa_kernels.backends.triton.plan import build_plan
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.testing import assert_cache_close, assert_close, upcast
from tests.cases import backward as backward_cases
from tests.cases.backward import UNEVEN
from tools.ptxsim.races import WRITE, Shadow
from tools.ptxsim.triton_front import TritonModule

from .aot import (
    TARGETS,
    Specialisation,
    compile_launch,
    every_option,
    make_cache,
    make_cache_call,
    make_call,
    runtime_arguments,
)

LARGE_GROUP = HeadMap([0] * 19 + [1], num_kv_heads=4)  # more heads than a tile has rows

Case = tuple[AttentionCall, ForwardCall, list[Launch]]


def prefill_case(arch: str, tile: Tile, q_len: int, kv_len: int, head_dim: int, dtype, **options):
    inputs, call = make_call(q_len, kv_len, head_dim, dtype, batch=1, head_map=UNEVEN, **options)
    return inputs, call, [prefill_launch(call, tile, 3)]


def decode_case(
    arch: str, num_splits: int, q_len: int, kv_len: int, head_map: HeadMap = UNEVEN,
    dtype: torch.dtype = torch.bfloat16, **options,
) -> Case:  # fmt: skip
    inputs, call = make_call(q_len, kv_len, 64, dtype, batch=2, head_map=head_map, **options)
    config = decode_config(call.shape, TARGETS[arch].facts, num_splits)
    return inputs, call, decode_launches(call, config)


def prefill_causal(arch: str) -> Case:
    tile = Tile(64, 64, 4, 2)
    return prefill_case(arch, tile, 72, 200, 64, torch.bfloat16, causal=True)


def prefill_everything(arch: str) -> Case:
    tile = Tile(64, 32, 4, 2)
    options = every_option(40, 72, UNEVEN.num_heads, 1)
    return prefill_case(arch, tile, 40, 72, 80, torch.float16, value_head_dim=48, **options)


def prefill_fp32(arch: str) -> Case:
    return prefill_case(arch, Tile(32, 32, 4, 2), 33, 70, 40, torch.float32, window=(20, 9))


def decode_splits(arch: str) -> Case:
    """A few query tokens and every byte of K and V once: the counters must show it."""
    return decode_case(arch, 4, 3, 900, causal=True)


def decode_everything(arch: str) -> Case:
    return decode_case(arch, 2, 3, 200, **every_option(3, 200, UNEVEN.num_heads, 2))


def decode_large_group(arch: str) -> Case:
    inputs, call, launches = decode_case(arch, 1, 1, 150, LARGE_GROUP, causal=True)
    assert launches[0].arguments["BLOCK_M"] < max(LARGE_GROUP.group_sizes)
    return inputs, call, launches


def decode_invalid_heads(arch: str) -> Case:
    """A map entry out of range, as a device tensor may hold: NaN for its head, others unchanged."""
    inputs, call, _ = decode_case(arch, 2, 2, 90, causal=True)
    head_map = torch.tensor([1, 0, 7, 1])
    inputs = inputs.replace(head_map=head_map)
    call = replace(call, plan=build_plan(head_map, 3, None, 3))
    config = decode_config(call.shape, TARGETS[arch].facts, 2)
    return inputs, call, decode_launches(call, config)


def decode_paged(arch: str) -> Case:
    """Pages of 16 in any order; uneven splits. The counters must show each byte once."""
    cache = make_cache(UNEVEN, [620, 300], 64, torch.bfloat16, page_size=16)
    inputs, call = make_cache_call([1, 1], cache, UNEVEN, torch.bfloat16)
    config = decode_config(call.shape, TARGETS[arch].facts, 3)
    return inputs, call, decode_launches(call, config)


def decode_fp8(arch: str) -> Case:
    """The same in fp8, with ragged query counts and one page per block of keys."""
    cache = make_cache(UNEVEN, [200, 77], 64, torch.float16, page_size=64, format="fp8_e4m3")
    inputs, call = make_cache_call([1, 3], cache, UNEVEN, torch.float16)
    config = decode_config(call.shape, TARGETS[arch].facts, 2)
    return inputs, call, decode_launches(call, config)


def decode_int4(arch: str) -> Case:
    cache = make_cache(UNEVEN, [90, 33], 64, torch.bfloat16, 3, format="int4", zeros=True)
    inputs, call = make_cache_call([2, 2], cache, UNEVEN, torch.bfloat16, window=(40, None))
    config = decode_config(call.shape, TARGETS[arch].facts, 1)
    return inputs, call, decode_launches(call, config)


def prefill_paged(arch: str) -> Case:
    """A chunk of prefill against pages: packed queries of different lengths."""
    cache = make_cache(UNEVEN, [90, 150], 64, torch.bfloat16, page_size=16)
    inputs, call = make_cache_call([70, 20], cache, UNEVEN, torch.bfloat16)
    return inputs, call, [prefill_launch(call, Tile(64, 32, 4, 2), 3)]


def decode_by_lengths(arch: str) -> Case:
    """Parts of a long sequence, one part of a short and of an empty one, and surplus parts."""
    cache = make_cache(UNEVEN, [450, 20, 0], 64, torch.bfloat16, page_size=16)
    inputs, call = make_cache_call([1, 1, 1], cache, UNEVEN, torch.bfloat16)
    facts = replace(TARGETS[arch].facts, num_sms=3)
    return inputs, call, decode_launches(call, decode_config(call.shape, facts))


def prefill_wide(arch: str) -> Case:
    """Latent attention's head dims: chunks of Q and K, and slices of V."""
    inputs, call = make_call(
        9, 40, 576, torch.bfloat16, value_head_dim=512, batch=1, head_map=HeadMap([0, 0]),
        causal=True,
    )  # fmt: skip
    return inputs, call, [prefill_launch(call, prefill_tile(call.shape, TARGETS[arch].facts), 2)]


def decode_wide(arch: str) -> Case:
    """Gemma 4's widest head dim, over pages."""
    cache = make_cache(UNEVEN, [70, 33], 512, torch.bfloat16, page_size=16)
    inputs, call = make_cache_call([1, 1], cache, UNEVEN, torch.bfloat16)
    config = decode_config(call.shape, TARGETS[arch].facts, 2)
    return inputs, call, decode_launches(call, config)


CASES: dict[str, Callable[[str], Case]] = {
    make.__name__: make
    for make in (
        prefill_causal, prefill_everything, prefill_fp32, decode_splits, decode_everything,
        decode_large_group, decode_invalid_heads, decode_paged, decode_fp8, decode_int4,
        prefill_paged, decode_by_lengths, prefill_wide, decode_wide,
    )
}  # fmt: skip


def report_races(stock_report: Callable = Shadow.report) -> None:
    """Let a store instruction meet itself in other warps.

    Triton spreads a small tile over more warps than it has elements; before a change of layout the
    warps that hold copies of an element each store it, the same value to the same place. Any other
    pair of unordered accesses still raises.
    """

    def report(shadow, granule, who, site, kind, other, other_site, other_kind, description):
        if not (kind == other_kind == WRITE and site == other_site):
            stock_report(
                shadow, granule, who, site, kind, other, other_site, other_kind, description
            )

    Shadow.report = report


def emulate(launch: Launch, arch: str) -> dict[str, object]:
    """Run a launch; its outputs are updated. Returns the emulator's counters."""
    gpu = TARGETS[arch].gpu
    arguments = runtime_arguments(launch, Specialisation.of(launch, gpu).types)
    module = TritonModule.from_compiled(compile_launch(launch, gpu), arguments)
    report = module.launch((launch.grid,), arguments, timeout=400)
    assert not report.warnings, report.warnings
    loads = [
        site
        for site in report.memory_sites
        if site["kind"] == "global" and " st.global" not in site["where"]
    ]
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "grid": launch.grid,
        "warp_instructions": report.warp_instructions,
        "tensor_flops": report.tensor_flops,
        "bytes_loaded": 32 * sum(site["sectors"] for site in loads),
        "unique_bytes": {name: read for name, (read, _) in report.touched.items() if read},
        "bank_conflicts": report.bank_conflicts,
    }


def check(inputs: AttentionCall, call: ForwardCall) -> None:
    """Hold the outputs of a call to the tolerance rule."""
    if inputs.memory != "dense":
        assert_cache_close(call.out, inputs, call.lse)
        return
    exact_out, exact_lse = reference_attention(upcast(inputs))
    eager = [reference_attention(inputs, inputs.dtype, base2)[0] for base2 in (False, True)]
    assert_close("out", call.out, exact_out, eager)
    eager = [reference_attention(inputs, None, base2)[1] for base2 in (False, True)]
    assert_close("lse", call.lse, exact_lse, eager)


def main() -> None:
    torch.set_num_threads(1)
    report_races()
    arch, *names = sys.argv[1:]
    for name in names or [*CASES, *backward_cases.CASES]:
        if name in CASES:
            inputs, call, launches = CASES[name](arch)
            check_case = partial(check, inputs, call)
        else:
            launches, check_case = backward_cases.CASES[name](arch)
        for launch in launches:
            print(json.dumps({"case": name, **emulate(launch, arch)}), flush=True)
        check_case()


if __name__ == "__main__":
    main()
