"""What a call costs beside its work: attention of a few keys, and short contexts.

``python -m benchmarks.studies.overhead --save`` writes ``results/DEVICE/overhead.json``, which
``python -m benchmarks.report`` shows. CPU only. The calls of a group take turns, on one input.

``--against PATH`` compares with another checkout of the repository: processes with its package and
with this one take turns, and each call's line says by which factor ours takes longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Spinning OpenMP threads slow a shared machine 25 times; OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa_kernels import HeadMap, asym_gqa_attention

from ..measure.timing import Settings, time_alternating
from ..report.display import seconds
from ..report.results import FOLDER, Results, Row, folder_name, header
from . import host_calls
from .host_calls import PLAIN, SDPA, Calls

OP = "overhead"
ROOT = Path(__file__).parents[2]
HEADS, KV_HEADS, DIM = 32, 8, 128  # Llama 3 8B
CONTEXTS = (128, 512, 1024)
TYPES = (torch.bfloat16, torch.float32)

Medians = dict[str, dict[str, float]]


def groups() -> Iterator[tuple[str, Calls]]:
    """Calls that take turns, by name, and what they have in common."""
    yield from host_calls.groups()
    for dtype in TYPES:
        for length in CONTEXTS:
            name = str(dtype).removeprefix("torch.")
            title = f"decode, {length} keys, {HEADS} on {KV_HEADS} heads, D {DIM}, {name}"
            yield title, _decode(length, dtype)


def _decode(length: int, dtype: torch.dtype) -> Calls:
    q = torch.randn(1, HEADS, 1, DIM, dtype=dtype)
    k, v = torch.randn(2, 1, KV_HEADS, length, DIM, dtype=dtype).unbind()
    head_map = HeadMap.uniform(HEADS, KV_HEADS)
    return {
        "asym_gqa_attention": lambda _: asym_gqa_attention(q, k, v, head_map),
        SDPA: lambda _: scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }


def measure(title: str, calls: Calls, settings: Settings) -> list[Row]:
    """Rows of a group, as results files have them."""
    with torch.no_grad():
        timings = time_alternating(calls, 1, torch.device("cpu"), settings)
    return [
        {
            "key": f"{title} | {name}", "case_key": title, "case": {"op": OP, "group": title},
            "contestant": name, "kind": "call", "status": "ok", **dataclasses.asdict(timing),
        }
        for name, timing in timings.items()
    ]  # fmt: skip


def run_child(package: Path, seconds_per_call: float) -> Medians:
    """Medians of :mod:`.host_calls` with the package of a checkout, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.studies.host_calls", "--package", str(package),
               "--seconds", str(seconds_per_call)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def compare(other: Path, rounds: int, seconds_per_call: float) -> list[tuple[str, str, list, list]]:
    """(group, call, our medians, theirs) of both checkouts; who is first changes every round."""
    sides: dict[Path, list[Medians]] = {ROOT: [], other: []}
    for i in range(rounds):
        for package in (ROOT, other) if i % 2 == 0 else (other, ROOT):
            sides[package].append(run_child(package, seconds_per_call))
    return [
        (title, name, *([found[title][name] for found in sides[p]] for p in (ROOT, other)))
        for title, calls in sides[ROOT][0].items()
        for name in calls
    ]


def print_comparison(lines: list[tuple[str, str, list, list]], other: Path) -> None:
    """Medians over the rounds; ratios are of rounds, so that a slow moment meets both sides."""
    shown, plain = None, 0.0
    for title, name, ours, theirs in lines:
        if title != shown:
            print(f"{title}\n  {'':26} {'here':>10} {'x plain':>8} {other.name:>14} {'ratio':>7}")
            shown = title
        median = statistics.median(ours)
        plain = median if name == PLAIN else plain
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"  {name:26} {seconds(median):>10} {median / plain:>8.2f} "
              f"{seconds(statistics.median(theirs)):>14} {ratio:>7.2f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="per call (0.3)")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument("--save", action="store_true", help=f"write {FOLDER.name}/DEVICE/{OP}.json")
    parser.add_argument("--against", type=Path, help="another checkout of the repository")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each side (7)")
    arguments = parser.parse_args(argv)
    if arguments.against is not None:
        other = arguments.against.resolve()
        if not (other / "gqa_kernels" / "__init__.py").is_file():
            parser.error(f"--against must be a checkout with a gqa_kernels folder, got {other}")
        print_comparison(compare(other, arguments.rounds, arguments.seconds), other)
        return 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results = Results(header(torch.device("cpu"), OP, {}))
    for title, calls in groups():
        rows = measure(title, calls, Settings(seconds=arguments.seconds))
        results.add(rows)
        print(title)
        plain = next((row["median"] for row in rows if row["contestant"] == PLAIN), None)
        for row in rows:
            ratio = "" if plain is None else f"{row['median'] / plain:6.2f} x plain"
            print(f"  {row['contestant']:26} {seconds(row['median']):>10} {ratio}", flush=True)
    if arguments.save:
        results.save(FOLDER / folder_name(results.header) / f"{OP}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
