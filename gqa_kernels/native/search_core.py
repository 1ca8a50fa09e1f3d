"""The compiled core of the grouping search (``csrc/search``): a pybind11 module, numpy in and out.

It is compiled at first use and kept beside the kernels. Without a compiler, the numpy code of
``gqa_kernels.grouping.search`` computes the same results more slowly.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from . import compiler, env, library_cache, sources

NAME = f"gqa_kernels_{sources.SEARCH}"


@lru_cache(maxsize=1)
def search_core() -> ModuleType | None:
    """The module, or None if it can't be compiled here. Cheap once loaded."""
    try:
        files = sources.read(sources.SEARCH)
        # A compiled module fits one Python version, and is linked to torch's libraries.
        python = f"{sys.implementation.cache_tag}-{torch.__version__.split('+')[0]}"
        name = f"{sources.SEARCH}-{sources.key_of(files)}-{python}"
        library = library_cache.find(f"{name}-*.so")
        if library is None:
            if not (files and env.build_enabled()):
                return None
            library = _build_once(name, files)
        return _loaded(library)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        print(f"gqa_kernels: the search runs on numpy, slower: {error}", file=sys.stderr)
        return None


def _build_once(name: str, files: dict[str, bytes]) -> Path:
    """The library; only one process compiles it at a time."""
    by = compiler.find_compiler()
    cache = library_cache.writable_folder()
    library = cache / f"{name}-{hashlib.sha256(by.key.encode()).hexdigest()[:8]}.so"
    with open(cache / f"{sources.SEARCH}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library_cache.is_intact(library):
            built = compiler.compile_module(sources.SEARCH, by, files, cache / "objects", lock)
            library_cache.keep(built, library)
    return library


def _loaded(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None  # the name ends in .so
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
