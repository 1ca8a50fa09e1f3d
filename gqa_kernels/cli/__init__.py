"""The command line, ``gqa-kernels``: demo, train-demo, search, convert, eval, inspect and more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..native import env
from ..reporting.errors import UsageError
from . import (
    backends,
    check_engine,
    convert,
    demo,
    environment,
    evaluate,
    inspect,
    search,
    serve,
    shard,
    train_demo,
)

COMMANDS = (demo, train_demo, search, convert, evaluate, inspect, shard, serve, check_engine)
COMMANDS += (backends, environment)
REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError, OSError, UsageError)
INTERRUPTED = 130  # the shell's exit status of a program that Ctrl-C stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status. 0: success, 1: a check failed, 2: it could not run, 130: interrupted.
    """
    arguments = parser().parse_args(argv)
    if argv is None:
        env.restart_with_passive_threads()
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        _complain(f"interrupted; {_kept(arguments) or 'nothing was kept'}")
        return INTERRUPTED
    except REFUSALS as error:
        _complain(str(error) or type(error).__name__)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="gqa-kernels", description=__doc__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def _kept(arguments: argparse.Namespace) -> str | None:
    """What an interrupted command leaves for the next run, None if nothing."""
    try:
        return arguments.kept(arguments) if hasattr(arguments, "kept") else None
    except REFUSALS:  # a file that no run can continue
        return None


def _complain(message: str) -> None:
    """One line on standard error, however many the message has."""
    print(f"gqa-kernels: {' '.join(message.split())}", file=sys.stderr)
