"""The fuzzer's command line.

    python -m tests.fuzz --minutes 2
    python -m tests.fuzz --hours 8 --first 1000000
    python -m tests.fuzz --seed 1234
    python -m tests.fuzz --asan --minutes 2

Calls run in child processes, so that a crash is reported with its seed. Each child uses one
instruction set of the CPU kernels. Exit status 1 means that a fault was found. Reports are printed,
and appended to fuzz.txt in the package's cache folder.
"""

from __future__ import annotations

import argparse
import sys

from gqa_kernels.native import env

from . import asan, children


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Random good and hostile calls of every function."
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="how long to run")
    parser.add_argument("--hours", type=float, default=0.0, help="the same, added")
    parser.add_argument("--calls", type=int, default=10**9, help="stop after so many calls")
    parser.add_argument("--first", type=int, default=0, help="first seed (0)")
    parser.add_argument("--seed", type=int, help="only the call of this seed, in this process")
    parser.add_argument("--isa", action="append", help="instruction set; all of them by default")
    parser.add_argument("--asan", action="store_true", help="build with AddressSanitizer first")
    arguments = parser.parse_args(argv)
    environment = asan.environment() if arguments.asan else {}
    if arguments.seed is not None:
        return children.one_seed(arguments.seed, environment)
    seconds = 60 * arguments.minutes + 3600 * arguments.hours
    if seconds <= 0:
        parser.error("give --minutes, --hours or --seed")
    path = env.cache_dir() / "fuzz.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"first seed {arguments.first}; --first {arguments.first} draws the same calls", flush=True
    )
    report = children.run(
        seconds, arguments.first, arguments.isa, environment, arguments.calls, path
    )
    print(report.summary())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
