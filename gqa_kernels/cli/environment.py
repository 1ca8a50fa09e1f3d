"""``gqa-kernels env``: versions, devices and settings, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
from collections.abc import Callable
from importlib import metadata

import torch

from ..native import build, compiler, env, library_cache

VERSIONS = ("gqa-kernels", "torch", "triton", "transformers", "ninja")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="versions, devices and settings, for bug reports")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    facts: dict[str, Callable[[], object]] = {
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        **{name: lambda name=name: _version(name) for name in VERSIONS},
        "device": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads,
        "OpenMP threads wait": lambda: env.omp_wait_policy() or "actively",
        "kernel cache": _cache,
        "C++ compiler": _compiler,
        "build at first use": lambda: "on" if env.build_enabled() else "off",
        "CPU kernels": lambda: build.unavailable_reason() or "usable",
        "CPU kernels run on": instruction_set,
        "CUDA kernels wanted": env.cuda_kernels,
        "CUDA kernels": build.cuda_build_info,
        "Triton interpreter": lambda: "on" if env.triton_interpreter() else "off",
    }
    for name, ask in facts.items():
        print(f"{name}: {answer(ask)}")
    print("variables:", " ".join(_variables()) or "none set")
    return 0


def answer(ask: Callable[[], object]) -> str:
    """What a function returns, or what is wrong: a report must not end where it is needed."""
    try:
        return str(ask())
    except Exception as error:
        return f"not known: {' '.join(str(error).split()) or type(error).__name__}"


def instruction_set() -> str:
    known = build.cpu_instruction_set()
    if known is None:
        wanted = f" (GQA_KERNELS_CPU_ISA={env.cpu_isa()})" if env.cpu_isa() else ""
        return f"not known: the kernels are built at first use{wanted}"
    return known


def _cache() -> str:
    folder = env.cache_dir()
    if folder in library_cache.folders() or not folder.exists():
        return f"{folder}{'' if library_cache.preferred_is_writable() else ', not writable'}"
    return f"{folder}, refused"


def _compiler() -> str:
    found = compiler.find_compiler()
    return f"{shlex.join(found.command)}: {(found.version.splitlines() or [''])[0]}"


def _variables() -> list[str]:
    return [f"{name}={os.environ[name]}" for name in env.VARIABLES if name in os.environ]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
