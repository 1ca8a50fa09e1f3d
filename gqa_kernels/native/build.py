"""The compiled part: finding it, building it at first use, loading it.

A wheel built where torch could be imported carries ``_C.abi3.so``, with CUDA kernels inside where
there was an nvcc. Any other installation compiles the same sources once, into the user's cache,
when a backend first needs them: the CPU kernels with the ops' schemas, and, where there are a GPU
and an nvcc, a second library with the CUDA kernels. One binary serves every torch from 2.10 on
(torch's stable ABI), so neither depends on the torch it was built with.

What is compiled is in ``sources.py``; what is particular to CUDA in ``cuda_build.py``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from . import cuda_build, env, sources
from .sources import COMPILE_FLAGS, PACKAGE, cpu_sources, source_root

LIBRARY = "_C.abi3.so"  # ahead of time, in the package

COMPILERS = ("c++", "g++", "clang++")
ERROR_LINES = 15

_lock = threading.RLock()
_loaded: dict[str, Path] = {}
_failures: dict[str, str] = {}


def load(part: str = "cpu") -> None:
    """Load the compiled ops, building them first where no build is found. Cheap once loaded.

    Args:
        part: "cpu", or "cuda" for the CUDA kernels of the ops as well.

    Raises:
        RuntimeError: they can't be built or loaded; the message says why. A second call says it
            again without another try.
    """
    if part in _loaded:
        return
    if part == "cuda":
        load("cpu")  # the ops' schemas
    with _lock:
        if part in _loaded:
            return
        if part not in _failures:
            try:
                library = _find_or_build(part)
                if library not in _loaded.values():
                    _load_library(library)
                _loaded[part] = library
                return
            except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                _failures[part] = str(error)
        raise RuntimeError(_failures[part])


def library_path(part: str = "cpu") -> Path | None:
    """The library that :func:`load` loaded for the part, if it did."""
    return _loaded.get(part)


def cpu_instruction_set() -> str | None:
    """What the CPU kernels run on: ``GQA_KERNELS_CPU_ISA`` or the best that this processor has.

    None where they are not built yet: nothing is built here.

    Raises:
        ValueError: the variable names none that this processor has.
    """
    if "cpu" not in _loaded and not (_ahead_of_time("cpu") or _cached_builds("cpu")):
        return None
    load("cpu")
    name = ctypes.CDLL(str(_loaded["cpu"])).gqa_kernels_cpu_isa
    name.restype = ctypes.c_char_p
    found = name()
    if found is None:
        from . import env

        raise ValueError(
            "GQA_KERNELS_CPU_ISA must name an instruction set of this processor, "
            f"got {env.cpu_isa()}"
        )
    return found.decode()


def unavailable_reason(part: str = "cpu") -> str | None:
    """Why :func:`load` can't work, as far as can be told without compiling; or None."""
    if part in _loaded:
        return None
    if part in _failures:
        return _failures[part]
    if _ahead_of_time(part) or _cached_builds(part):
        return None
    return _cannot_build(part)


def cuda_build_info() -> str:
    """What the CUDA kernels at hand were built with, or why there are none."""
    library = _ahead_of_time("cuda") or next(iter(_cached_builds("cuda")), None)
    if library is not None:
        return f"{cuda_build.build_info(library)} ({library})"
    reason = _cannot_build("cuda")
    return f"none: {reason}" if reason else "none yet: compiled at first use"


def _ahead_of_time(part: str) -> Path | None:
    """The library in the package; not one that an edited checkout has left behind."""
    library = PACKAGE / LIBRARY
    if not library.exists():
        return None
    root = source_root()
    if root.parent == PACKAGE.parent:
        newest = max(path.stat().st_mtime for path in sources.source_files(root))
        if newest > library.stat().st_mtime:
            return None
    if part == "cuda" and _build_info(library, library.stat().st_mtime) is None:
        return None
    return library


@lru_cache(maxsize=4)  # searches the whole file
def _build_info(library: Path, modified: float) -> str | None:
    return cuda_build.build_info(library)


def _cannot_build(part: str) -> str | None:
    if sys.platform != "linux":
        return f"the kernels compile on Linux only, this is {sys.platform}"
    if not cpu_sources(source_root()):
        return f"the kernels' sources are missing from {source_root()}"
    missing = _missing_cuda() if part == "cuda" else None
    if missing:
        return missing
    if not env.build_enabled():
        return "no compiled kernels were found, and GQA_KERNELS_BUILD=0 forbids building them"
    if _compiler() is None:
        return f"no C++ compiler was found (looked for $CXX, {', '.join(COMPILERS)})"
    return None


def _missing_cuda() -> str | None:
    """Why there can be no CUDA kernels but those that were built ahead of time."""
    if _toolkit() is None:
        without = "the installed extension was built without CUDA, and " if _without_cuda() else ""
        return f"{without}nvcc is missing (looked at $CUDA_HOME and PATH)"
    return None


def _without_cuda() -> bool:
    return _ahead_of_time("cpu") is not None and _ahead_of_time("cuda") is None


def _toolkit():
    return cuda_build.find_toolkit(env.cuda_home())


def _find_or_build(part: str) -> Path:
    library = _ahead_of_time(part)
    if library is not None:
        return library
    reason = _cannot_build(part)
    if reason is None:
        return _build_once(part)
    if _cached_builds(part):
        return _cached_builds(part)[0]
    raise RuntimeError(reason)


def _load_library(path: Path) -> None:
    from . import ops  # noqa: F401  (defines the ops)

    torch.ops.load_library(str(path))


def _compiler() -> str | None:
    explicit = env.cxx()
    if explicit:
        return shutil.which(explicit)
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _cached_builds(part: str) -> list[Path]:
    """Builds of these very sources, by whatever compiler."""
    return sorted(env.cache_dir().glob(f"{part}-{sources.source_key(part)}-*.so"))


def _build_once(part: str) -> Path:
    """The cached library for this compiler, built now if need be, by one process at a time."""
    import fcntl

    cache = env.cache_dir()
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    if version.returncode != 0:
        raise RuntimeError(f"{compiler} --version failed: {version.stderr.strip()}")
    made_by = version.stdout
    if part == "cuda":
        made_by += f"{_toolkit().version} {cuda_archs()}"
    compiler_key = hashlib.sha256(made_by.encode()).hexdigest()[:8]
    library = cache / f"{part}-{sources.source_key(part)}-{compiler_key}.so"
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
            built = _compile(part, compiler, Path(folder))
            os.replace(built, library)  # atomic: nobody sees half a file
    return library


def cuda_archs() -> tuple[str, ...]:
    """What to compile CUDA kernels for at first use: $TORCH_CUDA_ARCH_LIST, or the devices here.

    Raises:
        ValueError: the variable lists what can't be compiled for.
    """
    if env.cuda_arch_list():
        return cuda_build.parse_archs(env.cuda_arch_list())
    if not torch.cuda.is_available():
        return cuda_build.DEFAULT_ARCHS
    devices = range(torch.cuda.device_count())
    return tuple(sorted({cuda_build.arch_of(torch.cuda.get_device_capability(i)) for i in devices}))


def _compile(part: str, compiler: str, folder: Path) -> Path:
    """Compile and link the library of a part in ``folder``."""
    torch_root = Path(torch.__file__).parent
    commands = (_cuda_commands if part == "cuda" else _cpu_commands)(compiler, folder)
    print(
        f"gqa_kernels: building the {part.upper()} kernels (first use only), "
        f"{len(commands)} files ...",
        file=sys.stderr,
        flush=True,
    )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda command: _run(part, command), commands))
    built = folder / "library.so"
    objects = [command[-1] for command in commands]
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    if part == "cuda":
        from . import cuda_build

        libraries += [f"-L{_toolkit().libraries}", *cuda_build.LINK_FLAGS]
    _run(part, [compiler, "-shared", *objects, "-o", str(built), *libraries])
    return built


def _cpu_commands(compiler: str, folder: Path, units=None, flags=()) -> list[list[str]]:
    """One command per C++ file; the object comes last."""
    include = ["-isystem", str(Path(torch.__file__).parent / "include")]
    units = cpu_sources(source_root()) if units is None else units
    return [
        [compiler, *COMPILE_FLAGS, *flags, *include, "-c", str(source), "-o", f"{folder}/{i}.o"]
        for i, source in enumerate(units)
    ]


def _cuda_commands(compiler: str, folder: Path) -> list[list[str]]:
    root, toolkit, archs = source_root(), _toolkit(), cuda_archs()
    kernels = [
        cuda_build.compile_command(toolkit, root, source, folder / f"k{i}.o", archs, ptx=False)
        for i, source in enumerate(cuda_build.kernel_sources(root, archs))
    ]
    # The checks of the host code are in both libraries, hidden from each other.
    checks = (root / "host" / f"{name}.cpp" for name in ("inputs", "append_inputs", "gradients"))
    host = [*cuda_build.host_sources(root), *checks]
    flags = cuda_build.host_flags(toolkit, archs)
    return [*kernels, *_cpu_commands(compiler, folder, host, flags)]


def _run(part: str, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        said = "\n".join(lines[-ERROR_LINES:]) or "it printed nothing"
        raise RuntimeError(
            f"building the {part.upper()} kernels failed: {command[0]} exited with "
            f"{result.returncode}:\n{said}"
        )
