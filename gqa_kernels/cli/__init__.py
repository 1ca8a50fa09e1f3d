"""The command line, ``gqa-kernels``.

Each command's module imports torch only when it runs: help doesn't need torch, ``env`` must be able
to report that torch is broken, and Ctrl-C while torch loads is handled like any other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

from ..native import env
from ..reporting.errors import UsageError
from ..version import __version__
from . import (
    backends,
    check_engine,
    convert,
    demo,
    environment,
    evaluate,
    inspect,
    prune,
    search,
    serve,
    shard,
    train_demo,
)
from .outcome import add_json, results_to
from .parser import Parser, complain

# Each command's module has SUMMARY, EXAMPLE, add(commands), run(arguments) -> Outcome, and, if an
# interrupted run can be continued, kept(arguments).
GROUPS: dict[str, tuple[ModuleType, ...]] = {
    "Try it": (demo, train_demo),
    "Compress a model": (inspect, search, convert, prune, evaluate),
    "Serve it": (serve, shard, check_engine),
    "If something does not work": (environment, backends),
}
REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError, OSError, UsageError)
INTERRUPTED = 130  # the shell's exit status of a program that Ctrl-C stopped
EXIT_STATUS = "exit status: 0 success, 1 a check failed, 2 it could not run, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status. 0: success, 1: a check failed, 2: it could not run, 130: interrupted.
    """
    top = parser()
    arguments, unknown = top.parse_known_args(argv)
    if unknown:
        command = top if arguments.run is None else arguments.parser
        command.error(f"unknown arguments: {' '.join(unknown)}")
    if arguments.run is None:
        top.print_help()
        return 0
    env.let_threads_sleep()
    try:
        with results_to(arguments.json) as outcomes:
            outcomes.append(arguments.run(arguments))
        return outcomes[0].status
    except KeyboardInterrupt as interrupt:
        complain(f"interrupted; {str(interrupt) or _kept(arguments) or 'nothing was kept'}")
        return INTERRUPTED
    except REFUSALS as error:
        complain(str(error) or type(error).__name__)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="gqa-kernels",
        usage="gqa-kernels COMMAND [OPTIONS]",
        epilog="'gqa-kernels COMMAND --help' shows a command's options and an example.\n"
        + EXIT_STATUS,
    )
    top.add_argument("--version", action="version", version=__version__)
    top.set_defaults(run=None)
    commands = top.add_subparsers(prog=top.prog, metavar="COMMAND", help=argparse.SUPPRESS)
    paragraphs = ["Attention kernels for asymmetric grouped-query attention."]
    for title, modules in GROUPS.items():
        lines = [f"\n{title}:"]
        for module in modules:
            command = module.add(commands)
            lines.append(f"  {command.prog.split()[-1]:13} {module.SUMMARY}")
            command.set_defaults(parser=command)
            command.epilog = f"example:\n  {module.EXAMPLE}\n\n{EXIT_STATUS}"
            add_json(command)
        paragraphs.append("\n".join(lines))
    top.description = "\n".join(paragraphs)
    return top


def _kept(arguments: argparse.Namespace) -> str | None:
    """What an interrupted command leaves for the next run; None if nothing."""
    try:
        return arguments.kept(arguments) if hasattr(arguments, "kept") else None
    except REFUSALS:  # no run can continue this file
        return None
