"""Runs the compiled PTX of Triton launches on the CPU: ``python -m tests.emulation.emulate CASE``.

Prints one JSON object per kernel launch with the emulator's counters, after holding the outputs to
the package's tolerance rule. The emulator's checks (bounds, races, uninitialised shared memory,
unawaited copies) are on and raise.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, os.environ["PTXSIM"])

import ptxsim
import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.triton.configs import Tile, decode_config
from gqa_kernels.backends.triton.launch import ForwardCall, Launch, decode_launches, prefill_launch
from gqa_kernels.testing import assert_attention_close

from .aot import TARGETS, Signature, every_option, make_call

UNEVEN = HeadMap([1, 0, 1, 1], num_kv_heads=3)  # interleaved, with an empty group


def emulate(launch: Launch, arch: str) -> dict[str, object]:
    """Run a launch; its outputs are updated. Returns the emulator's counters."""
    signature = Signature.of(launch)
    module = ptxsim.Module.from_triton(
        launch.kernel,
        signature.types,
        signature.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        arch=TARGETS[arch].gpu.arch,
        attrs=signature.divisors,
    )
    arguments = {name: launch.arguments[name] for name in signature.types}
    report = module.launch((launch.grid,), arguments, timeout=400)
    assert not report.warnings, report.warnings
    loads = [site for site in report.memory_sites if site["kind"] == "global"]
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "grid": launch.grid,
        "seconds": round(report.seconds, 1),
        "warp_instructions": report.warp_instructions,
        "global_bytes_requested": report.global_bytes_requested,
        "bank_conflicts": report.bank_conflicts,
        "touched": {name: list(counts) for name, counts in report.touched.items()},
        "sites": [(site["where"], site["bytes"]) for site in loads],
    }
