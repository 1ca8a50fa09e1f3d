"""What is compiled: the C++ sources, their flags, and a hash of both.

``setup.py`` and the build at first use share these lists. What is particular to CUDA is in
``cuda_build.py``.
"""

from __future__ import annotations

import hashlib
import mmap
import platform
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LIBRARY = "_C.abi3.so"  # built ahead of time, inside the package
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # The backward recomputes the forward's scores bit for bit; fused multiply-adds would prevent
    # that.
    "-ffp-contract=off",
    # The stable ABI of torch 2.10 and Python 3.10: one library serves every later version.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030a0000",
)
PARTS = ("cpu", "cuda")  # one library each; "cuda" adds the CUDA kernels of the ops
SEARCH = "search"  # a Python module of its own (search_core.py), in a folder of this name
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
# A file that instantiates kernels for one of these takes many times longer than any other.
ISAS = ("amx", "avx512", "avx2", "neon", "portable")
SLOWEST_ISAS = ("avx512", "avx2")  # those with loops for every type, above all the forward's


def source_root() -> Path:
    """``csrc`` of a checkout, or its copy in an installed package."""
    checkout = PACKAGE.parent / "csrc"
    return checkout if (checkout / "bindings.cpp").exists() else PACKAGE / "_csrc"


def source_files(root: Path, part: str = "cuda") -> list[Path]:
    """Every file that affects the library of a part."""
    files = sorted(path for suffix in SUFFIXES for path in root.rglob(f"*{suffix}"))
    search = root / SEARCH
    if part == SEARCH:
        return [path for path in files if search in path.parents]
    files = [path for path in files if search not in path.parents]
    return [path for path in files if part == "cuda" or not is_cuda(root, path)]


def is_cuda(root: Path, path: Path) -> bool:
    """Whether a file belongs to the CUDA part only: under ``cuda/``, or named ``*_cuda``."""
    return path.relative_to(root).parts[0] == "cuda" or path.stem.endswith("_cuda")


def cpu_sources(root: Path) -> list[Path]:
    """The translation units of the CPU library. Those that take longest to compile come first."""
    units = [path for path in source_files(root, "cpu") if path.suffix == ".cpp"]
    return sorted(units, key=lambda path: _seems_slow(path.relative_to(root)), reverse=True)


def _seems_slow(path: Path) -> tuple[bool, bool, bool]:
    instantiates = any(isa in path.stem for isa in ISAS)
    slowest = path.stem.endswith(SLOWEST_ISAS)
    return instantiates, slowest, slowest and "backward" not in path.as_posix()


def read(part: str) -> dict[str, bytes]:
    """The content of each of :func:`source_files`, by its path below the root."""
    root = source_root()
    files = source_files(root, part)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def key_of(files: Mapping[str, bytes]) -> str:
    """Hash of everything that affects the library, apart from the compiler."""
    digest = hashlib.sha256(repr((COMPILE_FLAGS, platform.machine())).encode())
    for name, content in files.items():
        digest.update(f"{name}\0".encode() + content + b"\0")
    return digest.hexdigest()[:16]


@lru_cache(maxsize=4)
def source_key(part: str) -> str:
    """:func:`key_of` the sources as they were when this was first called."""
    return key_of(read(part))


def key_unit(key: str) -> str:
    """A C++ file that stores a key in the library that it is linked into."""
    visible = '__attribute__((visibility("default")))'
    return f'extern "C" {visible} const char gqa_kernels_sources[] = "gqa_kernels sources {key}";\n'


def key_in(library: Path) -> str | None:
    """The key that :func:`key_unit` stored, read from the file; None if it has none."""
    found = find_text(library, rb"gqa_kernels sources ([0-9a-f]+)\0")
    return found[0].decode() if found else None


def find_text(library: Path, pattern: bytes) -> tuple[bytes, ...] | None:
    """The groups of the first match in a file's content, without loading it."""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = re.search(pattern, text)
        return found.groups() if found else None
