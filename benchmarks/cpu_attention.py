"""The native CPU kernels against torch's SDPA: the table of the CPU backend's goals.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cpu_attention [--quick] [--json FILE]

Contestants take turns in one process with one number of threads; ratios are of medians. A result is
held to the tolerance rule before anything is timed. ``sdpa`` gets whatever it can run: on equal
groups ``enable_gqa``, on uneven ones a cache that was expanded beforehand (``expanded``), or one
that is expanded in the call, as users have to (``expand``). The general harness (models, maps, all
backends and peers) is ``benchmarks.run``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.backends.cpu import CPUBackend
from gqa_kernels.inputs import AttentionInputs
from gqa_kernels.testing import assert_attention_close, make_inputs

from .limits import Limits
from .roofline import attention_work
from .timing import Settings, time_alternating

EVEN = HeadMap.uniform(32, 8)
UNEVEN = HeadMap.from_group_sizes([9, 7, 5, 4, 3, 2, 1, 1])
BACKEND = CPUBackend()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHECKED_KEYS = 600  # of the gate's own, shorter call: its reference holds all scores


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def causal(self) -> bool:
        return self.q_len > 1

    def __str__(self) -> str:
        phase = "prefill" if self.causal else "decode"
        name = str(self.dtype).removeprefix("torch.")
        return f"{phase} {name} B{self.batch} Sk{self.kv_len} D{self.head_dim}"


def cases(quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for batch, kv_len in [(1, 128), (1, 1024), (1, 8192), (8, 8192)][: 3 if quick else 4]:
            yield Case(dtype, batch, 1, kv_len, 128)
        for length in (1024,) if quick else (1024, 4096):
            for head_dim in (128, 64):
                yield Case(dtype, 1, length, length, head_dim)


def check(case: Case) -> None:
    """The gate: a call with all of the case but its length, on both maps."""
    kv_len = min(case.kv_len, CHECKED_KEYS)
    q_len = min(case.q_len, CHECKED_KEYS)
    for head_map in (EVEN, UNEVEN):
        q, k, v = make_inputs(1, head_map, q_len, kv_len, case.head_dim, dtype=case.dtype)
        out = asym_gqa_attention(q, k, v, head_map, causal=case.causal, backend="cpu")
        assert_attention_close(out, q, k, v, head_map, causal=case.causal)


def measure(case: Case, limits: Limits, settings: Settings) -> dict:
    check(case)
    q, k, v = make_inputs(
        case.batch, EVEN, case.q_len, case.kv_len, case.head_dim, dtype=case.dtype
    )
    index = torch.tensor(UNEVEN.entries)
    wide = k[:, index], v[:, index]

    def ours(head_map: HeadMap):
        return lambda _: asym_gqa_attention(q, k, v, head_map, causal=case.causal, backend="cpu")

    def sdpa(k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    runs = {
        "even": ours(EVEN),
        "uneven": ours(UNEVEN),
        "gqa": lambda _: F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=True
        ),
        "expanded": lambda _: sdpa(*wide),
        "expand": lambda _: sdpa(k[:, index], v[:, index]),
    }
    timings = time_alternating(runs, 1, q.device, settings)
    seconds = {name: timing.median for name, timing in timings.items()}
    work = attention_work(
        EVEN, case.batch, case.q_len, case.kv_len, case.head_dim, q.element_size(),
        causal=case.causal,
    )  # fmt: skip
    return {
        "case": {**asdict(case), "dtype": str(case.dtype)},
        "seconds": seconds,
        "samples": {name: timing.samples for name, timing in timings.items()},
        "sdpa_gqa_over_even": seconds["gqa"] / seconds["even"],
        "sdpa_expanded_over_uneven": seconds["expanded"] / seconds["uneven"],
        "expand_sdpa_over_uneven": seconds["expand"] / seconds["uneven"],
        "uneven_over_even": seconds["uneven"] / seconds["even"],
        "part_of_streaming_read": work.bytes
        / seconds["even"]
        / limits.bytes_per_second(work.bytes),
        "part_of_matrix_product": work.flops
        / seconds["even"]
        / limits.flops_per_second(torch.float32),
    }


def overhead(settings: Settings) -> dict[str, float]:
    """Seconds of the smallest call there is: the op alone, and through the public function."""
    head_map = HeadMap([0])
    q, k, v = make_inputs(1, head_map, 1, 1, 8)
    inputs = AttentionInputs.create(q, k, v, head_map)
    runs = {
        "op": lambda _: BACKEND.run(inputs),
        "asym_gqa_attention": lambda _: asym_gqa_attention(q, k, v, head_map),
        "sdpa": lambda _: F.scaled_dot_product_attention(q, k, v),
    }
    timings = time_alternating(runs, 1, q.device, settings)
    return {name: timing.median for name, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter samples")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    failure = BACKEND.prepare()
    if failure:
        parser.error(failure)
    settings = Settings().quick() if arguments.quick else Settings()
    limits = Limits(torch.device("cpu"))

    with torch.no_grad():
        small = overhead(settings)
        print(f"threads {torch.get_num_threads()}; smallest call, microseconds:", end=" ")
        print(", ".join(f"{name} {1e6 * s:.1f}" for name, s in small.items()))
        print(f"fp32 matrix product {limits.flops_per_second(torch.float32) / 1e9:.0f} GFLOP/s")
        print(
            f"{'case':34} {'even ms':>9} {'SDPA gqa':>9} {'uneven/':>8} {'expanded':>9} "
            f"{'expand+':>9} {'of read':>8} {'of FMA':>7}\n"
            f"{'':34} {'':>9} {'/ even':>9} {'even':>8} {'/ uneven':>9} {'/ uneven':>9}"
        )
        rows = []
        for case in cases(arguments.quick):
            row = measure(case, limits, settings)
            rows.append(row)
            print(
                f"{case!s:34} {1e3 * row['seconds']['even']:9.3f} "
                f"{row['sdpa_gqa_over_even']:8.2f}x {row['uneven_over_even']:8.3f} "
                f"{row['sdpa_expanded_over_uneven']:8.2f}x {row['expand_sdpa_over_uneven']:8.2f}x "
                f"{row['part_of_streaming_read']:8.0%} {row['part_of_matrix_product']:7.0%}",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"overhead": small, "limits": limits.to_json(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
