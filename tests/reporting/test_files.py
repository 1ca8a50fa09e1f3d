"""Files and folders that appear whole or not at all."""

import pytest

from gqa_kernels.reporting.files import write_atomically


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
