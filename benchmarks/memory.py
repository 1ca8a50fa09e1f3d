"""Peak memory of a training step's attention, forward and backward: ours against expand + SDPA.

    python -m benchmarks.memory [--model llama-3.2-1b] [--map 9-7-5-4-3-2-1-1] [--length 4096]

Each runs in a process of its own on the CPU; what counts is how far its resident memory rises above
where it was with the inputs made. Expand + SDPA keeps K and V expanded for its backward, and makes
gradients of the same size before they come down to the KV heads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .backward import BackwardBackend, BackwardProblem, BackwardSdpa
from .cases import Case
from .models import MODELS, SKEWED

CONTESTANTS = {
    "cpu": lambda: BackwardBackend("cpu"),
    "expand+sdpa": lambda: BackwardSdpa("expand+sdpa"),
}
MIB = 2**20


def expanded_bytes(case: Case) -> int:
    """K and V expanded to all query heads, and their gradients."""
    one = case.batch * case.head_map.num_heads * case.kv_len * case.head_dim
    return 4 * one * case.torch_dtype.itemsize


def rise(case: Case, contestant: str) -> int:
    """Bytes by which a forward and a backward raise the peak, measured in a new process."""
    arguments = [case.model, case.map, str(case.kv_len), case.dtype, contestant]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--child", *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-2000:])
    return int(result.stdout.split()[-1])


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b")
    parser.add_argument("--map", default=SKEWED)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args(argv)
    case = _case(arguments.model, arguments.map, arguments.length, arguments.dtype)
    print(f"{case.key}: expanded K, V and their gradients {expanded_bytes(case) / MIB:.0f} MiB")
    for name in CONTESTANTS:
        print(f"{name}: peak rises by {rise(case, name) / MIB:.0f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
