"""The child process of the fuzzer: calls of ascending seeds until its time is up.

``python -m tests.fuzz.worker FIRST SECONDS [COUNT]``. It prints one JSON object per line: a line
with the seed before each call, and one with what went wrong after a call that failed.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import time
from pathlib import Path

import torch

from gqa_kernels.native import build

from .run import quiet, run_seed

SECONDS_PER_CALL = 120  # on a busy machine; what takes longer hangs
MEMORY = 4 << 30  # an absurd size ends in a MemoryError before it hurts the machine


def main(first: int, seconds: float, count: int) -> None:
    faulthandler.enable()
    quiet()
    torch.set_num_threads(1)
    build.load()  # its first use compiles, which is no hanging call
    if "libasan" not in Path("/proc/self/maps").read_text():  # its shadow memory is larger
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    end = time.monotonic() + seconds
    for seed in range(first, first + count):
        if time.monotonic() > end:
            break
        say(seed=seed)
        faulthandler.dump_traceback_later(SECONDS_PER_CALL, exit=True)
        try:
            names = run_seed(seed)
            say(covered=names)
        except AssertionError as error:
            say(fault=str(error))
        faulthandler.cancel_dump_traceback_later()
    say(done=True)


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 10**9)
