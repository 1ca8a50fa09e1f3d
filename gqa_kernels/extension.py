"""The compiled part: its sources and flags, finding it, building it at first use, loading it.

A wheel built where torch could be imported carries ``_C.abi3.so``. Any other installation compiles
the same sources once, into the user's cache, when a backend first needs them. One binary serves
every torch from 2.10 on (torch's stable ABI), so neither depends on the torch it was built with.

``setup.py`` loads this file by its path, without the package and without torch: both are imported
where they are needed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARY = "_C.abi3.so"  # ahead of time, in the package

# CPU sources. A CUDA source set (csrc/cuda) gets its own list and its own library beside this one.
CPU_SOURCE_DIRS = (".", "host", "cpu")
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10
    "-DPy_LIMITED_API=0x030a0000",
)
COMPILERS = ("c++", "g++", "clang++")
ERROR_LINES = 15

_lock = threading.Lock()
_loaded: Path | None = None
_failure: str | None = None


def source_root() -> Path:
    """``csrc`` of a checkout, or the copy of it in an installed package."""
    checkout = PACKAGE.parent / "csrc"
    return checkout if (checkout / "bindings.cpp").exists() else PACKAGE / "_csrc"


def cpu_sources(root: Path) -> list[Path]:
    """The translation units of the CPU library."""
    return [path for name in CPU_SOURCE_DIRS for path in sorted((root / name).glob("*.cpp"))]


def load() -> None:
    """Load the compiled ops, building them first where no build is found. Cheap once loaded.

    Raises:
        RuntimeError: they can't be built or loaded; the message says why. A second call says it
            again without another try.
    """
    global _loaded, _failure
    if _loaded is not None:
        return
    with _lock:
        if _loaded is not None:
            return
        if _failure is None:
            try:
                library = _find_or_build()
                _load_library(library)
                _loaded = library
                return
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                _failure = str(error)
        raise RuntimeError(_failure)


def library_path() -> Path | None:
    """The library that :func:`load` loaded, if it did."""
    return _loaded


def unavailable_reason() -> str | None:
    """Why :func:`load` can't work, as far as can be told without compiling; or None."""
    if _loaded is not None:
        return None
    if _failure is not None:
        return _failure
    if _ahead_of_time() or _cached_builds():
        return None
    return _cannot_build()


def _ahead_of_time() -> Path | None:
    """The library in the package; not one that an edited checkout has left behind."""
    library = PACKAGE / LIBRARY
    if not library.exists():
        return None
    root = source_root()
    if root.parent == PACKAGE.parent:
        newest = max(path.stat().st_mtime for path in _source_files(root))
        if newest > library.stat().st_mtime:
            return None
    return library


def _source_files(root: Path) -> list[Path]:
    return sorted([*root.rglob("*.h"), *root.rglob("*.cpp")])


def _cannot_build() -> str | None:
    from . import env

    if sys.platform != "linux":
        return f"the kernels compile on Linux only, this is {sys.platform}"
    if not cpu_sources(source_root()):
        return f"the kernels' sources are missing from {source_root()}"
    if not env.build_enabled():
        return "no compiled kernels were found, and GQA_KERNELS_BUILD=0 forbids building them"
    if _compiler() is None:
        return f"no C++ compiler was found (looked for $CXX, {', '.join(COMPILERS)})"
    return None


def _find_or_build() -> Path:
    library = _ahead_of_time()
    if library is not None:
        return library
    reason = _cannot_build()
    if reason is None:
        return _build_once()
    if _cached_builds():
        return _cached_builds()[0]
    raise RuntimeError(reason)


def _load_library(path: Path) -> None:
    import torch

    torch.ops.load_library(str(path))
    from . import ops  # noqa: F401  (fake kernels; needs the ops' schemas)


def _compiler() -> str | None:
    from . import env

    explicit = env.cxx()
    if explicit:
        return shutil.which(explicit)
    return next(filter(None, map(shutil.which, COMPILERS)), None)


@lru_cache(maxsize=1)  # asked for at every call where the kernels can't be built
def _source_key() -> str:
    """Hash of everything that decides what the library does, apart from the compiler."""
    root = source_root()
    digest = hashlib.sha256(repr((COMPILE_FLAGS, platform.machine())).encode())
    for path in _source_files(root):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cached_builds() -> list[Path]:
    """Builds of these very sources, by whatever compiler."""
    from . import env

    return sorted(env.cache_dir().glob(f"cpu-{_source_key()}-*.so"))


def _build_once() -> Path:
    """The cached library for this compiler, built now if need be, by one process at a time."""
    import fcntl

    from . import env

    cache = env.cache_dir()
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    if version.returncode != 0:
        raise RuntimeError(f"{compiler} --version failed: {version.stderr.strip()}")
    compiler_key = hashlib.sha256(version.stdout.encode()).hexdigest()[:8]
    library = cache / f"cpu-{_source_key()}-{compiler_key}.so"
    if library.exists():
        return library

    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "build.lock", "w") as lock:
        # The kernel drops the lock of a process that dies, so a killed build blocks nobody.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        for stale in cache.glob("build-*"):  # left by killed builds: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
            built = _compile(compiler, Path(folder))
            os.replace(built, library)  # atomic: nobody sees half a file
    return library


def _compile(compiler: str, folder: Path) -> Path:
    """Compile and link the library in ``folder``."""
    import torch

    torch_root = Path(torch.__file__).parent
    sources = cpu_sources(source_root())
    print(
        f"gqa_kernels: building the CPU kernels (first use only), {len(sources)} files ...",
        file=sys.stderr,
        flush=True,
    )

    def compile_one(indexed: tuple[int, Path]) -> str:
        index, source = indexed
        target = str(folder / f"{index}.o")
        include = ["-isystem", str(torch_root / "include")]
        _run([compiler, *COMPILE_FLAGS, *include, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, enumerate(sources)))
    built = folder / "library.so"
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    _run([compiler, "-shared", *objects, "-o", str(built), *libraries])
    return built


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        said = "\n".join(lines[-ERROR_LINES:]) or "it printed nothing"
        raise RuntimeError(
            f"building the CPU kernels failed: {command[0]} exited with "
            f"{result.returncode}:\n{said}"
        )
