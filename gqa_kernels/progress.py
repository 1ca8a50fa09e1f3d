"""track(): a progress bar around a loop, and files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T], title: str, total: int | None = None, shown: bool = True, done: int = 0
) -> Iterator[T]:
    """Iterate under a bar on standard error, where that is a terminal and rich is installed.

    Args:
        items: what to iterate over; ``len(items)`` is the total where none is given.
        title: text before the bar.
        total: number of items, those done before included.
        shown: False for no bar.
        done: items done before (a resumed loop).
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


def write_atomically(path: str | Path, data: bytes | str) -> Path:
    """Write a file; a reader, or a crash, sees the old content or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return path
