"""The parent process of the fuzzer: starts children, and tells what happened to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # on x86; each has those before
ARM_ISAS = ("portable", "neon", "neon_dot", "neon_fhm", "neon_bf16")
WORKER = ["-m", "tests.fuzz.worker"]
LONGEST_CHILD = 30.0  # seconds
MOST_FAULTS = 20


@dataclass
class Report:
    """What a run found.

    Attributes:
        faults: text of each.
        covered: how often each public name was called rightly.
        path: a file to which faults are appended when they are found, so that no report is lost
            with a terminal, or None.
    """

    calls: int = 0
    faults: list[str] = field(default_factory=list)
    covered: Counter[str] = field(default_factory=Counter)
    path: Path | None = None

    def summary(self) -> str:
        names = ", ".join(f"{name} {count}" for name, count in sorted(self.covered.items()))
        text = f"{self.calls} calls, {len(self.faults)} faults; good calls: {names}"
        return f"{text}\nreports are kept in {self.path}" if self.faults and self.path else text

    def add(self, fault: str) -> None:
        self.faults.append(fault)
        print(fault, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(f"{fault}\n")


def instruction_sets() -> list[str]:
    """Those that the CPU kernels can use here, the best first."""
    from gqa_kernels.native import build

    build.load()
    best = build.cpu_instruction_set()
    sets = ARM_ISAS if best in ARM_ISAS else ISAS
    return list(reversed(sets[: sets.index(best) + 1]))


def run(
    seconds: float, first: int = 0, isas: list[str] | None = None,
    environment: dict[str, str] | None = None, calls: int = 10**9, path: Path | None = None,
) -> Report:  # fmt: skip
    """Children one after another, each with the next instruction set, for some time or until there
    were so many calls. ``path``: where the report keeps its faults."""
    report, end, turn = Report(path=path), time.monotonic() + seconds, 0
    isas = isas or instruction_sets()
    slice_of_one = min(LONGEST_CHILD, seconds / len(isas))
    while time.monotonic() < end and report.calls < calls and len(report.faults) < MOST_FAULTS:
        isa = isas[turn % len(isas)]
        left = min(slice_of_one, end - time.monotonic())
        count = min(calls - report.calls, -(-calls // len(isas)))
        first = run_child(report, first, left, isa, environment or {}, count)
        turn += 1
    return report


def run_child(
    report: Report, first: int, seconds: float, isa: str, environment: dict[str, str],
    count: int = 10**9,
) -> int:  # fmt: skip
    """Calls from a seed on in a child process; the next seed."""
    command = [sys.executable, *WORKER, str(first), str(seconds), str(count)]
    child_environment = {**os.environ, "GQA_KERNELS_CPU_ISA": isa, **environment}
    seed, finished = None, False
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env=child_environment,
        )  # fmt: skip
        for line in child.stdout:
            words = json.loads(line)
            seed = words.get("seed", seed)
            report.calls += "seed" in words
            report.covered.update(words.get("covered", ()))
            finished |= words.get("done", False)
            if "fault" in words:
                _add(report, seed, isa, environment, words["fault"])
        status = child.wait()
        if not finished:
            errors.seek(0)
            text = f"the process ended with status {status}\n{errors.read()[-6000:]}"
            _add(report, seed, isa, environment, text)
    return first if seed is None else seed + 1


def _add(report: Report, seed: int | None, isa: str, environment: dict, text: str) -> None:
    option = " --asan" if "LD_PRELOAD" in environment else ""
    command = f"GQA_KERNELS_CPU_ISA={isa} python -m tests.fuzz --seed {seed}{option}"
    report.add(f"seed {seed}: {text}\n  again: {command}")


def one_seed(seed: int, environment: dict[str, str]) -> int:
    """The call of one seed, in a process whose errors are shown as they are."""
    code = f"from tests.fuzz.run import quiet, run_seed; quiet(); run_seed({seed}); print('passed')"
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
