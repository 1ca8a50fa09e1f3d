"""What a command returns, and ``--json``, which writes it for programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..reporting.errors import UsageError

PRINT = "-"


class Outcome(NamedTuple):
    """The result of a command.

    Attributes:
        facts: what ``--json`` writes.
        status: the exit status: 0, or 1 if a check failed.
    """

    facts: Any
    status: int = 0


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the results there; - prints them, and everything else to standard error",
    )


@contextlib.contextmanager
def results_to(path: str | None) -> Iterator[list[Outcome]]:
    """Write the outcome that the block appends to the yielded list.

    Raises:
        UsageError: no file can be written there. Raised before the block runs.
    """
    outcomes: list[Outcome] = []
    if path is None:
        yield outcomes
    elif path == PRINT:
        with contextlib.redirect_stdout(sys.stderr):
            yield outcomes
        print(_text(outcomes[0]))
    else:
        from ..reporting.files import write_atomically

        _check(Path(path))
        yield outcomes
        write_atomically(path, _text(outcomes[0]) + "\n")


def _text(outcome: Outcome) -> str:
    return json.dumps(outcome.facts, indent=1)


def _check(path: Path) -> None:
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--json must be a file in an existing, writable folder, got {path}")
