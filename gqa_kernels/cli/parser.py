"""An argparse parser with errors of one line, and help that keeps indented lines unchanged."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def fill(line: str) -> str:
            return super(_Help, self)._fill_text(line, width, indent)

        return "\n".join(x if x.startswith("  ") else fill(x) for x in text.splitlines())


class Parser(argparse.ArgumentParser):
    """The parser of the command line. The parsers of commands have the same class."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        complain(f"{message} ({self.prog} --help shows the options)", self.prog)
        sys.exit(2)


def complain(message: str, program: str = "gqa-kernels") -> None:
    """Print a message on one line of standard error, even if it has several lines."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
