"""Steps: a progress bar for each step of a program. A finished step prints a line with its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Steps:
    """Runs steps under progress bars on a console."""

    def __init__(self, console: Console):
        self.console = console

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show ``title`` with a bar. Call the returned function once per unit of ``total``."""
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=30)]
        if total is not None:
            columns.append(MofNCompleteColumn())
        columns.append(TimeElapsedColumn())
        if total is not None:
            columns += [TextColumn("left:"), TimeRemainingColumn()]
        started = time.perf_counter()
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bars:
            task = bars.add_task(title, total=total)
            yield lambda: bars.advance(task)
        self.console.print(f"{title} [dim]{time.perf_counter() - started:.1f} s[/dim]")
