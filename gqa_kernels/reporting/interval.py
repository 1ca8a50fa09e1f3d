"""Interval: decides when to write an intermediate state."""

from __future__ import annotations

import time


class Interval:
    """Due at once, and then ``seconds`` after each ``restart``.

    Args:
        seconds: the most work that a run may lose; with 0 it is always due.
    """

    def __init__(self, seconds: float = 60.0):
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        self.seconds = seconds
        self._due = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def restart(self) -> None:
        """Start counting again. Call it after the state has been written."""
        self._due = time.monotonic() + self.seconds
