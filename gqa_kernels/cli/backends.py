"""``gqa-kernels backends``: what can run here, and why not the others."""

from __future__ import annotations

import argparse

import torch

from ..backends.dispatch import BACKENDS
from ..native import env
from .environment import answer, instruction_set


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("backends", help="what can run here, and why not the others")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device {device}, Triton interpreter {'on' if env.triton_interpreter() else 'off'}")
    for name, backend in BACKENDS.items():
        can = backend.capabilities
        reason = answer(backend.unavailable_reason)
        usable = reason == "None"
        print(f"{name}: {'usable' if usable else f'not usable: {reason}'}")
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in can.dtypes)
        print(f"  {', '.join(sorted(can.devices))}; {', '.join(dtypes)}")
        print(f"  head dim up to {can.max_head_dim}; backward {'yes' if can.autograd else 'no'}")
        print(f"  options {', '.join(sorted(can.options))}")
        if name == "cpu" and usable:
            print(f"  instruction set {answer(instruction_set)}")
    return 0
