"""The CPU library built with AddressSanitizer, for the fuzzer's children.

The package builds it as it always does, by a compiler that is a small script: it adds the sanitizer
and lowers the optimisation, which compiles several times faster. The result has a cache folder of
its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gqa_kernels.native import env

ROOT = Path(__file__).parents[2]
SCRIPT = """#!/bin/sh
unset LD_PRELOAD
for word in "$@"; do
  shift
  [ "$word" = -O3 ] && word=-O1
  set -- "$@" "$word"
done
exec {compiler} "$@" -fsanitize=address -fno-omit-frame-pointer -g1
"""
BUILD = "from gqa_kernels.native import build; build.load(); print(build.library_path())"


def environment() -> dict[str, str]:
    """Variables of a process that runs the sanitized library, which is built first if need be."""
    folder = env.cache_dir() / "asan"
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("--asan needs g++, which was not found")
    script = folder / "c++"
    script.write_text(SCRIPT.format(compiler=compiler))
    script.chmod(0o700)
    runtime = [_library(compiler, "libasan.so"), _library(compiler, "libstdc++.so.6")]
    found = {
        "CXX": str(script),
        "GQA_KERNELS_CACHE": str(folder),
        # ASan looks for the C++ library's __cxa_throw when it starts, long before torch brings it.
        "LD_PRELOAD": " ".join(runtime),
        # Python and torch free little at the end. Absurd sizes must end in a Python exception.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
    }
    subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, env={**os.environ, **found}, check=True)
    return found


def _library(compiler: str, name: str) -> str:
    """Where a library of the compiler lies."""
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
