"""The recovery benchmark on a tiny model: rows, resuming, and the picture."""

import json

import pytest

from benchmarks import recovery
from tests.test_demo import load_tiny

SMALL = recovery.Settings(
    steps=1, calibration=(2, 16), training=(3, 16), evaluation=(2, 16), learning_rate=1e-3
)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setattr(recovery, "load_smollm2", load_tiny)
    monkeypatch.setattr(recovery, "KV_HEADS", (3, 2))


def test_rows_and_resuming(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "rows.json", tmp_path / "rows.svg"
    recovery.run(SMALL, [0], path, picture)
    content = json.loads(path.read_text())
    rows = {(row["method"], row["kv_heads"]): row for row in content["rows"]}
    assert len(rows) == 2 * len(recovery.METHODS) + 1
    stock = rows["stock", 3]
    for (_, heads), row in rows.items():
        assert row["expanded_difference"] < 1e-4
        if heads == 3:  # the parent's own groups
            assert row["before"] == pytest.approx(stock["before"], rel=1e-4)
            assert row["layer_error"] < 1e-8
        else:
            assert row["layer_error"] > 0
        assert row["after"] != row["before"]
    assert "uneven, aligned" in picture.read_text()
    capsys.readouterr()
    recovery.run(SMALL, [0, 1], path, picture)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * len(rows)  # before and after
    assert all("seed 1" in line for line in printed)


def test_file_of_other_settings(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"settings": {}, "rows": []}))
    with pytest.raises(ValueError, match="must be of these settings"):
        recovery.run(SMALL, [0], path, tmp_path / "rows.svg")
