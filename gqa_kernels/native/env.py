"""Every environment variable of the package, read here and nowhere else in Python.

| variable | meaning (default) |
|---|---|
| ``GQA_KERNELS_CACHE`` | folder of compiled kernels (``$XDG_CACHE_HOME/gqa_kernels``) |
| ``GQA_KERNELS_BUILD`` | ``0``: never compile at first use (``1``) |
| ``CXX`` | C++ compiler for that, with arguments if need be: ``ccache g++`` (``c++``, ``g++`` or \
``clang++``) |
| ``MAX_JOBS`` | how many files to compile at a time, as in torch (default: one per processor) |
| ``CUDA_HOME`` | CUDA toolkit for that and for ``setup.py`` (the one of the nvcc on PATH) |
| ``GQA_KERNELS_CUDA`` | ``0``: no CUDA kernels; ``1``: ``setup.py`` fails without nvcc (``auto``) |
| ``TORCH_CUDA_ARCH_LIST`` | devices to compile for, ``8.0;9.0`` (at first use: this machine's) |
| ``GQA_KERNELS_CPU_ISA`` | instruction set of the CPU kernels: ``portable``, ``neon``, ``avx2``, \
``avx512``, ``avx512_bf16`` or ``amx`` (the best one here) |
| ``GQA_KERNELS_CPU_SUBNORMALS`` | ``cheap`` or ``costly``: whether subnormal operands are slow. \
The AVX2 kernels choose their fp8 decoding by it (``cheap`` on AMD) |
| ``TRITON_INTERPRET`` | Triton's: ``1`` runs its kernels on the CPU, slowly, for tests (``0``) |
| ``OMP_WAIT_POLICY`` | OpenMP's; the command line sets ``PASSIVE`` if it is unset |
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

# What the table above lists.
VARIABLES = tuple(re.findall(r"^\| ``(\w+)`` \|", __doc__ or "", re.M))


def cache_dir() -> Path:
    """Folder for kernels compiled at first use (not created here).

    Raises:
        ValueError: it lies in a home directory, and there is none.
    """
    explicit = os.environ.get("GQA_KERNELS_CACHE")
    setting = explicit or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(setting).expanduser()
    except RuntimeError:
        raise ValueError(f"the home directory of {setting} can't be found") from None
    if explicit:
        return folder.absolute()
    if not folder.is_absolute():  # HOME or XDG_CACHE_HOME: such a path means nothing
        raise ValueError(f"the folder of caches must be an absolute path, got {folder}")
    return folder / "gqa_kernels"


def build_enabled() -> bool:
    """Whether the kernels may be compiled at first use.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    setting = os.environ.get("GQA_KERNELS_BUILD", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"GQA_KERNELS_BUILD must be 0 or 1, got {setting!r}")
    return setting == "1"


def cxx() -> list[str]:
    """The C++ compiler in ``CXX`` with its arguments, as ``["ccache", "g++"]``; empty if unset.

    Raises:
        ValueError: the variable has an unmatched quotation mark.
    """
    try:
        return shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise ValueError(f"CXX must be a command, got {os.environ['CXX']!r} ({error})") from None


def max_jobs() -> int:
    """How many files may be compiled at a time: ``MAX_JOBS``, or one per processor of this
    process."""
    setting = os.environ.get("MAX_JOBS", "")
    return int(setting) if setting.isdecimal() and int(setting) else len(os.sched_getaffinity(0))


def cpu_isa() -> str | None:
    """The instruction set that the user chose, if any (csrc/cpu/isa/cpu_features.cpp reads it,
    too)."""
    return os.environ.get("GQA_KERNELS_CPU_ISA") or None


def cuda_home() -> str | None:
    """The CUDA toolkit that the user chose, if any."""
    return os.environ.get("CUDA_HOME") or None


def cuda_kernels() -> str:
    """Whether to build and use CUDA kernels: "auto", "0" or "1"."""
    setting = os.environ.get("GQA_KERNELS_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"GQA_KERNELS_CUDA must be auto, 0 or 1, got {setting!r}")
    return setting


def cuda_arch_list() -> str | None:
    """The compute capabilities to compile for, if the user chose them."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or None


def triton_interpreter() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def omp_wait_policy() -> str | None:
    """How OpenMP's threads wait, if the user chose it."""
    return os.environ.get("OMP_WAIT_POLICY")


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user chose otherwise. Call it before
    torch is loaded: OpenMP reads the setting then.

    By default they spin, which is 25 times slower if one other process is busy.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
