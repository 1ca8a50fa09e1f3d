"""The compiled part: finding it, building it at first use, loading it.

A wheel that was built with torch installed contains ``_C.abi3.so``, with CUDA kernels if nvcc was
there too. Any other installation compiles the same sources once, into the user's cache, when a
backend first needs them. That makes one library with the CPU kernels and the ops' schemas and, on a
machine with a GPU and nvcc, a second one with the CUDA kernels. They use torch's stable ABI only,
so one binary serves every torch from 2.10 on.

``sources.py`` lists what is compiled, and ``cuda_build.py`` has what is particular to CUDA.
What is compiled is in ``sources.py``; what is particular to CUDA in ``cuda_build.py``.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from . import compiler, cuda_build, env, library_cache, sources
from .sources import LIBRARY, PACKAGE, cpu_sources, source_root

_lock = threading.RLock()
_loaded: dict[str, Path] = {}
_failures: dict[str, str] = {}


def load(part: str = "cpu") -> None:
    """Load the compiled ops, and build them first if no build is found. Cheap once loaded.

    Args:
        part: "cpu", or "cuda" for the CUDA kernels of the ops as well.

    Raises:
        RuntimeError: they can't be built or loaded; the message says why. A second call raises the
            same error without trying again.
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
                if part == "cuda":
                    _probe(library)
                _loaded[part] = library
                return
            except Exception as error:  # after any error, another backend can run the call
                _failures[part] = str(error) or type(error).__name__
        raise RuntimeError(_failures[part])


def library_path(part: str = "cpu") -> Path | None:
    """The library that :func:`load` loaded for this part; None if it did not."""
    return _loaded.get(part)


def cpu_instruction_set() -> str | None:
    """The instruction set of the CPU kernels: ``GQA_KERNELS_CPU_ISA``, or the processor's best.

    None if the kernels are not built yet. This function builds nothing.

    Raises:
        OSError: the library can't be loaded.
        ValueError: the variable names no instruction set that this processor has.
    """
    with _lock:
        if "cpu" not in _loaded:
            library = _kept("cpu")
            if library is None:
                return None
            _load_library(library)
            _loaded["cpu"] = library
    name = ctypes.CDLL(str(_loaded["cpu"])).gqa_kernels_cpu_isa
    name.restype = ctypes.c_char_p
    found = name()
    if found is None:
        raise ValueError(
            "GQA_KERNELS_CPU_ISA must name an instruction set of this processor, "
            f"got {env.cpu_isa()}"
        )
    return found.decode()


def unavailable_reason(part: str = "cpu") -> str | None:
    """Why :func:`load` would fail, as far as is known without compiling; else None. Never
    raises."""
    if part in _loaded:
        return None
    if part in _failures:
        return _failures[part]
    try:
        return None if _exists(part) else _cannot_build(part)
    except Exception as error:  # the caller wants an answer, not an error
        return str(error) or type(error).__name__


def cuda_build_info() -> str:
    """What the available CUDA kernels were built with, or why there are none."""
    library = _kept("cuda")
    if library is not None:
        return f"{cuda_build.build_info(library)} ({library})"
    reason = _cannot_build("cuda")
    return f"none: {reason}" if reason else "none yet: compiled at first use"


def _kept(part: str) -> Path | None:
    """A library of the current sources that may be loaded; any compiler may have built it."""
    return _ahead_of_time(part) or library_cache.find(f"{part}-{sources.source_key(part)}-*.so")


def _exists(part: str) -> bool:
    """Whether a library of the current sources seems to exist; any compiler may have built it."""
    if _ahead_of_time(part):
        return True
    return bool(library_cache.candidates(f"{part}-{sources.source_key(part)}-*.so"))


def _ahead_of_time(part: str) -> Path | None:
    """The library in the package, unless it is left over from older sources of a checkout."""
    library = PACKAGE / LIBRARY
    if not library.exists():
        return None
    key, cuda = _facts(library, library.stat().st_mtime_ns)
    in_checkout = source_root().parent == PACKAGE.parent
    if in_checkout and key != sources.source_key("cuda"):  # of all sources
        return None
    return None if part == "cuda" and cuda is None else library


@lru_cache(maxsize=4)  # each call searches the whole file
def _facts(library: Path, modified: int) -> tuple[str | None, str | None]:
    """The key of a library's sources, and the build that its CUDA kernels come from."""
    return sources.key_in(library), cuda_build.build_info(library)


def _cannot_build(part: str) -> str | None:
    """Why nothing can be compiled here, and what to do about it."""
    if sys.platform != "linux":
        return f"the kernels compile on Linux only, this is {sys.platform}"
    if not cpu_sources(source_root()):
        return f"the kernels' sources are missing from {source_root()}"
    missing = _missing_cuda() if part == "cuda" else None
    if missing:
        return missing
    try:
        if not env.build_enabled():
            return "no compiled kernels were found, and GQA_KERNELS_BUILD=0 forbids building them"
        compiler.find_compiler()
        compiler.find_ninja()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def _missing_cuda() -> str | None:
    """Why no CUDA kernels can be built here."""
    if _toolkit() is None:
        without = "the installed extension was built without CUDA, and " if _without_cuda() else ""
        return f"{without}nvcc is missing (looked at $CUDA_HOME and PATH)"
    return None


def _without_cuda() -> bool:
    return _ahead_of_time("cpu") is not None and _ahead_of_time("cuda") is None


def _toolkit() -> cuda_build.Toolkit | None:
    return cuda_build.find_toolkit(env.cuda_home())


def _find_or_build(part: str) -> Path:
    """A library of the current sources: from the wheel, from the cache, or compiled now.

    A cached library of this compiler is preferred. One of another compiler comes next: it is better
    than none, and better than a new one that could only be kept in a temporary folder.
    """
    library = _ahead_of_time(part)
    if library is not None:
        return library
    files = sources.read(part)
    name = f"{part}-{sources.key_of(files)}"
    reason = _cannot_build(part)
    if reason is None and library_cache.preferred_is_writable():
        return _build_once(part, name, files)
    library = library_cache.find(f"{name}-*.so")
    if library is not None:
        return library
    if reason is None:
        return _build_once(part, name, files)
    raise RuntimeError(reason)


def _load_library(path: Path) -> None:
    from . import ops  # noqa: F401  (defines the ops)

    torch.ops.load_library(str(path))


def _probe(library: Path) -> None:
    """Launch an empty kernel of a library on the current device.

    Raises:
        RuntimeError: no kernel of the library runs there; the message says what to do.
    """
    probe = ctypes.CDLL(str(library)).gqa_kernels_cuda_probe
    probe.restype = ctypes.c_char_p
    reason = probe()
    if reason is not None:
        raise RuntimeError(
            f"the CUDA kernels ({cuda_build.build_info(library)}) don't run here: "
            f"{reason.decode(errors='replace')}. Update the driver, install a CUDA toolkit that is "
            "not newer than it, or set GQA_KERNELS_CUDA=0 to do without these kernels"
        )


def _build_once(part: str, name: str, files: Mapping[str, bytes]) -> Path:
    """This compiler's library in the cache. If there is none, one process builds it; others
    wait."""
    import fcntl

    by = compiler.find_compiler()
    toolkit = _toolkit() if part == "cuda" else None
    target = compiler.CudaTarget(toolkit, cuda_archs()) if toolkit else None
    made_by = by.key + (f"{target.toolkit.version} {target.archs}" if target else "")
    name = f"{name}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}.so"
    library = library_cache.find(name)
    if library is not None:
        return library
    cache = library_cache.writable_folder()
    library = cache / name
    with open(cache / "build.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("gqa_kernels: waiting for a build in another process", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if library_cache.is_intact(library):
            return library
        library_cache.remove_unfinished(cache)
        built = compiler.compile_library(part, by, target, files, cache / "objects", lock)
        library_cache.keep(built, library)
    return library


def cuda_archs() -> tuple[str, ...]:
    """The devices to compile CUDA kernels for: $TORCH_CUDA_ARCH_LIST, or those of this machine.

    Raises:
        ValueError: the variable names a device that the kernels don't support.
    """
    archs = env.cuda_arch_list()
    if archs:
        return cuda_build.parse_archs(archs)
    if not torch.cuda.is_available():
        return cuda_build.DEFAULT_ARCHS
    devices = range(torch.cuda.device_count())
    return tuple(sorted({cuda_build.arch_of(torch.cuda.get_device_capability(i)) for i in devices}))
