"""Shows a build's progress on standard error: a bar on a terminal, else a line for each file."""

from __future__ import annotations

import sys
import time

WIDTH = 24  # of the bar


class BuildProgress:
    """Shows each compiled file, the time passed and, if it can be estimated, the time left.

    Attributes:
        expected: estimated seconds of the whole build; None if unknown.
    """

    def __init__(self) -> None:
        self.expected: float | None = None
        self._started = time.monotonic()
        self._shown = 0  # length of the bar's line

    def show(self, done: int, total: int, name: str) -> None:
        """Report a compiled file.

        Args:
            done: number of files compiled so far.
            total: number of files.
            name: the file compiled last.
        """
        seconds = time.monotonic() - self._started
        text = f"[{done}/{total}] {name}, {seconds:.0f} s{self._left(seconds, done == total)}"
        if not sys.stderr.isatty():
            say(text)
            return
        filled = WIDTH * done // total
        line = f"gqa_kernels: {'#' * filled}{'.' * (WIDTH - filled)} {text}"
        print(f"\r{line:{self._shown}}", end="", file=sys.stderr, flush=True)
        self._shown = len(line)

    def end(self) -> None:
        """End the bar's line, if there is one."""
        if self._shown:
            print(file=sys.stderr, flush=True)
            self._shown = 0

    def _left(self, seconds: float, finished: bool) -> str:
        if self.expected is None or finished or seconds >= self.expected:
            return ""
        return f", about {self.expected - seconds:.0f} s left"


def say(message: str) -> None:
    print(f"gqa_kernels: {message}", file=sys.stderr, flush=True)
