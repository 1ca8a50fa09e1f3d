"""``gqa-kernels env``: versions, devices and settings, for bug reports."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch

from ..native import build, env


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="versions, devices and settings, for bug reports")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    lines = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in ("gqa-kernels", "torch", "triton", "transformers")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
        "OpenMP threads wait": env.omp_wait_policy() or "actively",
        "kernel cache": str(env.cache_dir()),
        "CPU kernels run on": instruction_set(),
        "CUDA kernels": build.cuda_build_info(),
        "build at first use": "on" if env.build_enabled() else "off",
        "Triton interpreter": "on" if env.triton_interpreter() else "off",
    }
    for name, value in lines.items():
        print(f"{name}: {value}")
    return 0


def instruction_set() -> str:
    return build.cpu_instruction_set() or "not known: the kernels are built at first use"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
