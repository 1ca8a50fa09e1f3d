"""What is compiled: the C++ sources, their flags, and a hash of both.

``setup.py`` and the build at first use share these lists. What is particular to CUDA is in
``cuda_build.py``.
"""

from __future__ import annotations

import hashlib
import platform
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # The stable ABI of torch 2.10 and of Python 3.10: one library serves every later version.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030a0000",
)
PARTS = ("cpu", "cuda")  # a library each; the second adds the CUDA kernels of the ops
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
# A file that instantiates kernels for one of these compiles many times longer than any other.
ISAS = ("amx", "avx512", "avx2", "portable")


def source_root() -> Path:
    """``csrc`` of a checkout, or the copy of it in an installed package."""
    checkout = PACKAGE.parent / "csrc"
    return checkout if (checkout / "bindings.cpp").exists() else PACKAGE / "_csrc"


def source_files(root: Path, part: str = "cuda") -> list[Path]:
    """Every file that decides what the library of a part does."""
    files = sorted(path for suffix in SUFFIXES for path in root.rglob(f"*{suffix}"))
    return [path for path in files if part == "cuda" or not is_cuda(root, path)]


def is_cuda(root: Path, path: Path) -> bool:
    """Whether a file is of the CUDA part only: under ``cuda/``, or named ``*_cuda``."""
    return path.relative_to(root).parts[0] == "cuda" or path.stem.endswith("_cuda")


def cpu_sources(root: Path) -> list[Path]:
    """The translation units of the CPU library, those first that take longest to compile."""
    units = [path for path in source_files(root, "cpu") if path.suffix == ".cpp"]
    return sorted(units, key=lambda path: any(isa in path.stem for isa in ISAS), reverse=True)


@lru_cache(maxsize=4)  # reads every file
def source_key(part: str) -> str:
    """Hash of everything that decides what the library does, apart from the compiler."""
    root = source_root()
    digest = hashlib.sha256(repr((COMPILE_FLAGS, platform.machine())).encode())
    for path in source_files(root, part):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
