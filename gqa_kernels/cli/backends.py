"""``gqa-kernels backends``: what can run here, and why not the others."""

from __future__ import annotations

import argparse

from ..native import env
from .environment import answer, instruction_set
from .outcome import Outcome

SUMMARY = "what can run here, and why not the others"
EXAMPLE = "gqa-kernels backends"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("backends", help=SUMMARY, description="Compiles nothing.")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    import torch

    from ..backends.dispatch import BACKENDS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    interpreter = env.triton_interpreter()
    print(f"device {device}, Triton interpreter {'on' if interpreter else 'off'}")
    found = {}
    for name, backend in BACKENDS.items():
        can = backend.capabilities
        reason = answer(backend.unavailable_reason)
        usable = reason == "None"
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in can.dtypes)
        found[name] = {
            "usable": usable,
            "reason": None if usable else reason,
            "devices": sorted(can.devices),
            "dtypes": dtypes,
            "max_head_dim": can.max_head_dim,
            "backward": can.autograd,
            "options": sorted(can.options),
        }
        print(f"{name}: {'usable' if usable else f'not usable: {reason}'}")
        print(f"  {', '.join(sorted(can.devices))}; {', '.join(dtypes)}")
        print(f"  head dim up to {can.max_head_dim}; backward {'yes' if can.autograd else 'no'}")
        print(f"  options {', '.join(sorted(can.options))}")
        if name == "cpu" and usable:
            found[name]["instruction_set"] = answer(instruction_set)
            print(f"  instruction set {found[name]['instruction_set']}")
    return Outcome({"device": device, "triton_interpreter": interpreter, "backends": found})
