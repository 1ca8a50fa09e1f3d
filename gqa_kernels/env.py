"""Every environment variable of the package, read here and nowhere else.

| variable | meaning | default |
|---|---|---|
| ``GQA_KERNELS_CACHE`` | folder of kernels compiled at first use | ``$XDG_CACHE_HOME/gqa_kernels`` |
| ``GQA_KERNELS_BUILD`` | ``0``: never compile at first use | ``1`` |
| ``CXX`` | C++ compiler for that | ``c++``, ``g++`` or ``clang++`` |
| ``GQA_KERNELS_CPU_ISA`` | CPU kernels' instruction set (``portable``, ``avx2``) | the best there is |
| ``TRITON_INTERPRET`` | Triton's own: ``1`` runs its kernels on the CPU (slow; for tests) | ``0`` |
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for kernels compiled at first use (not created here)."""
    explicit = os.environ.get("GQA_KERNELS_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "gqa_kernels"


def build_enabled() -> bool:
    """Whether the compiled part may be built at first use."""
    return os.environ.get("GQA_KERNELS_BUILD", "1") != "0"


def cxx() -> str | None:
    """The C++ compiler asked for, if any."""
    return os.environ.get("CXX") or None


def triton_interpreter() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
