"""Peak memory of a training step's attention, forward and backward: ours against expand + SDPA.

    python -m benchmarks.studies.memory [--save]
    python -m benchmarks.studies.memory --model llama-3.2-1b [--map 9-7-5-4-3-2-1-1] [--length 4096]

Each runs in a process of its own on the CPU; what counts is how far its resident memory rises above
where it was with the inputs made. Expand + SDPA keeps K and V expanded for its backward, and makes
gradients of the same size before they come down to the KV heads.

``--save`` writes results/DEVICE/memory.json; ``python -m benchmarks.report`` makes a table of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.cases import Case
from ..data.models import MODELS, SKEWED
from ..measure.harness import row_key
from ..ops.backward import BackwardBackend, BackwardProblem, BackwardSdpa
from ..report.results import FOLDER, Results, Row, folder_name, header

CONTESTANTS = {
    "cpu": lambda: BackwardBackend("cpu"),
    "expand+sdpa": lambda: BackwardSdpa("expand+sdpa"),
}
MODELS_AND_TYPES = (("llama-3.2-1b", "float32"), ("llama-3-8b", "bfloat16"))  # unless given
MIB = 2**20


def expanded_bytes(case: Case) -> int:
    """K and V expanded to all query heads, and their gradients."""
    one = case.batch * case.head_map.num_heads * case.kv_len * case.head_dim
    return 4 * one * case.torch_dtype.itemsize


def rise(case: Case, contestant: str) -> int:
    """Bytes by which a forward and a backward raise the peak, measured in a new process."""
    arguments = [case.model, case.map, str(case.kv_len), case.dtype, contestant]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.studies.memory", "--child", *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-2000:])
    return int(result.stdout.split()[-1])


def measure(case: Case) -> list[Row]:
    """A row for each contestant."""
    return [
        {
            "key": row_key(case, name),
            "case_key": case.key,
            "case": case.facts,
            "contestant": name,
            "peak_bytes": rise(case, name),
            "expanded_bytes": expanded_bytes(case),
        }
        for name in CONTESTANTS
    ]


def _child(model: str, head_map: str, length: str, dtype: str, contestant: str) -> int:
    def step(length: int) -> int:
        problem = BackwardProblem.build(_case(model, head_map, length, dtype), torch.device("cpu"))
        leaves = [x.requires_grad_() for x in problem.copies[0]]
        forward, dout = CONTESTANTS[contestant]().forward(problem), problem.douts[0]
        before = _peak()
        torch.autograd.grad(forward(*leaves), leaves, dout)
        return _peak() - before

    step(16)  # libraries, thread pool
    print(step(int(length)))
    return 0


def _peak() -> int:
    """Most bytes of resident memory so far, of this program: getrusage would keep a parent's."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def _case(model: str, head_map: str, length: int, dtype: str) -> Case:
    return Case("backward", model, head_map, 1, length, length, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--child"]:
        return _child(*argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.memory", description=__doc__
    )
    parser.add_argument("--model", choices=MODELS, help="default: two of them, 4,096 tokens")
    parser.add_argument("--map", default=SKEWED)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", help="of --model")
    parser.add_argument("--save", action="store_true", help="write results/DEVICE/memory.json")
    arguments = parser.parse_args(argv)
    chosen = [(arguments.model, arguments.dtype)] if arguments.model else MODELS_AND_TYPES
    about = header(torch.device("cpu"), "memory", dict.fromkeys(CONTESTANTS, "available"))
    results = Results(about)
    for model, dtype in chosen:
        case = _case(model, arguments.map, arguments.length, dtype)
        expanded = expanded_bytes(case) / MIB
        print(f"{case.key}: expanded K, V and their gradients {expanded:.0f} MiB", flush=True)
        rows = measure(case)
        for row in rows:
            print(f"{row['contestant']}: peak rises by {row['peak_bytes'] / MIB:.0f} MiB")
        results.add(rows)
        if arguments.save:
            results.save(FOLDER / folder_name(about) / "memory.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
