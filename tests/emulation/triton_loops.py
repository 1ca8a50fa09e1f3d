"""Main loops of Triton's kernels, counted: ``python -m tests.emulation.triton_loops``

Instructions of a warp for a step of the inner loop of prefill, on tiles that need no mask,
at D 128 in bf16, in the machine code that Triton compiles ahead of time. Exits with 1 if there are
more than there may be.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tools.sass import disassemble
from tools.sass.loops import Loop, main_loops

from .aot import TARGETS, compile_launch
from .resources import Configuration

MOST = {"sm_80": 490, "sm_90": 575}


def inner_loop(target: str) -> Loop:
    """The prefill's inner loop, which of all its loops is the shortest: the others mask."""
    configuration = Configuration("prefill", 128, torch.bfloat16, "none")
    (launch,) = configuration.launches(TARGETS[target])
    compiled = compile_launch(launch, TARGETS[target].gpu)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = disassemble.disassemble(cubin)
    return min(main_loops(kernel), key=lambda loop: len(loop.path))


def main() -> None:
    torch.set_num_threads(1)
    failed = False
    for target, most in MOST.items():
        loop = inner_loop(target)
        size = len(loop.path)
        print(f"{target}: {size} instructions, {dict(loop.counts)}, at most {most}")
        failed |= size > most
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
