"""track() and write_atomically()."""

import pytest

from gqa_kernels.progress import track, write_atomically


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


def test_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, "first")
    assert write_atomically(path, b"second") == path
    assert path.read_text() == "second"

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "third")
    assert path.read_text() == "second"
    assert [each.name for each in path.parent.iterdir()] == ["file"]
