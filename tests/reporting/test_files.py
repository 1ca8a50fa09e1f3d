"""Files and folders that appear whole or not at all."""

import os
import stat

import pytest
import torch

from gqa_kernels.reporting.files import (
    check_new_folder,
    check_output_folder,
    new_folder,
    read_state,
    write_atomically,
)
from gqa_kernels.reporting.interval import Interval


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


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)]
)
def test_modes_follow_the_umask(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", "x")
        with new_folder(tmp_path / "folder") as unfinished:
            (unfinished / "weights").touch(0o600)
            (unfinished / "sub").mkdir(0o700)
    finally:
        os.umask(before)

    def mode(name):
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("file") == mode("folder/weights") == file
    assert mode("folder") == mode("folder/sub") == folder


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as unfinished:
        (unfinished / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_places_to_write_to(tmp_path):
    assert check_new_folder("out", tmp_path / "a/b") == tmp_path / "a/b"
    assert check_output_folder("out", tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out must not exist or be empty"):
        check_new_folder("out", tmp_path)
    for check in (check_new_folder, check_output_folder):
        with pytest.raises(ValueError, match=r"out must (lie in a folder|not exist)"):
            check("out", tmp_path / "file")
        with pytest.raises(ValueError, match="out must lie in a folder"):
            check("out", tmp_path / "file" / "below")


def test_places_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="out must be writable"):
        check_output_folder("out", tmp_path / "below")


class Harmful:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize("content", [Harmful(), [1, 2]])
def test_states_run_no_code(tmp_path, content):
    torch.save(content, tmp_path / "state")
    with pytest.raises(ValueError, match="state must"):
        read_state(tmp_path / "state")


def test_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interval = Interval(60)
    assert interval.is_due()
    interval.restart()
    now[0] = 159.0
    assert not interval.is_due()
    now[0] = 160.0
    assert interval.is_due()
    with pytest.raises(ValueError, match="seconds must be at least 0, got -1"):
        Interval(-1)
