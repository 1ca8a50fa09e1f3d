"""track(): shows a progress bar around a loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T], title: str, total: int | None = None, shown: bool = True, done: int = 0
) -> Iterator[T]:
    """Iterate, and show a bar on standard error if that is a terminal and rich is installed.

    Args:
        items: what to iterate over; the total defaults to ``done + len(items)``.
        title: text before the bar.
        total: number of items, including those that an earlier run finished.
        shown: False to show no bar.
        done: number of items that an earlier run finished.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        yield from items
        return
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = done + len(items)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, completed=done)
        for item in items:
            yield item
            bars.advance(task)
