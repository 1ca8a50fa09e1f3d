"""The CPU library built with AddressSanitizer, for the fuzzer's children."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from gqa_kernels import env, extension

FLAGS = ("-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer")


def environment() -> dict[str, str]:
    """Variables of a process that runs the sanitized library, which is built first if need be."""
    runtime = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "GQA_FUZZ_LIBRARY": str(library()),
        "LD_PRELOAD": runtime,
        # torch and Python leak by design; guard pages have to be mapped at any address.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    }
