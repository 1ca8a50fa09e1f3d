"""track()."""

import pytest

from gqa_kernels.reporting.progress import track


def test_items_pass_through_unchanged():
    assert list(track(range(5), "Counting")) == list(range(5))
    assert list(track(iter("ab"), "Letters", total=3, done=1)) == ["a", "b"]


def test_a_bar_where_there_is_a_terminal(monkeypatch):
    console = pytest.importorskip("rich.console")
    shown = []
    monkeypatch.setattr(console.Console, "is_terminal", property(lambda self: True))
    monkeypatch.setattr(console.Console, "print", lambda self, *objects, **_: shown.append(objects))
    progress = pytest.importorskip("rich.progress")
    steps = []
    monkeypatch.setattr(progress.Progress, "advance", lambda self, task: steps.append(task))
    assert list(track("abc", "Letters")) == ["a", "b", "c"]
    assert len(steps) == 3
    assert list(track("abc", "Letters", shown=False)) == ["a", "b", "c"]
    assert len(steps) == 3
