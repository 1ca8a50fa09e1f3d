"""``gqa-kernels env``: versions, devices and settings, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
from collections.abc import Callable
from importlib import metadata

from ..native import env
from .outcome import Outcome

SUMMARY = "versions, devices and settings, for bug reports"
EXAMPLE = "gqa-kernels env"
VERSIONS = ("gqa-kernels", "torch", "triton", "transformers", "ninja")


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("env", help=SUMMARY, description="Compiles nothing.")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    questions: dict[str, Callable[[], object]] = {
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        **{name: lambda name=name: _version(name) for name in VERSIONS},
        "device": _device,
        "threads": _threads,
        "OpenMP threads wait": lambda: env.omp_wait_policy() or "actively",
        "kernel cache": _cache,
        "C++ compiler": _compiler,
        "build at first use": lambda: "on" if env.build_enabled() else "off",
        "CPU kernels": _cpu_kernels,
        "CPU kernels run on": instruction_set,
        "CUDA kernels wanted": env.cuda_kernels,
        "CUDA kernels": _cuda_kernels,
        "Triton interpreter": lambda: "on" if env.triton_interpreter() else "off",
    }
    facts: dict[str, object] = {name: answer(ask) for name, ask in questions.items()}
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    variables = {name: os.environ[name] for name in env.VARIABLES if name in os.environ}
    print("variables:", " ".join(f"{n}={x}" for n, x in variables.items()) or "none set")
    return Outcome({**facts, "variables": variables})


# These functions import torch only when they are called, and then report what is wrong with it.


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _cpu_kernels() -> str:
    from ..native import build

    return build.unavailable_reason() or "usable"


def _cuda_kernels() -> str:
    from ..native import build

    return build.cuda_build_info()


def answer(ask: Callable[[], object]) -> str:
    """What a function returns, or its error: the report must be complete when things are broken."""
    try:
        return str(ask())
    except Exception as error:
        return f"not known: {' '.join(str(error).split()) or type(error).__name__}"


def instruction_set() -> str:
    """The instruction set of the CPU kernels, as far as it is known without compiling them."""
    from ..native import build

    known = build.cpu_instruction_set()
    if known is None:
        wanted = f" (GQA_KERNELS_CPU_ISA={env.cpu_isa()})" if env.cpu_isa() else ""
        return f"not known: the kernels are built at first use{wanted}"
    return known


def _cache() -> str:
    from ..native import library_cache

    folder = env.cache_dir()
    if folder in library_cache.folders() or not folder.exists():
        return f"{folder}{'' if library_cache.preferred_is_writable() else ', not writable'}"
    return f"{folder}, refused"


def _compiler() -> str:
    from ..native import compiler

    found = compiler.find_compiler()
    return f"{shlex.join(found.command)}: {(found.version.splitlines() or [''])[0]}"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
