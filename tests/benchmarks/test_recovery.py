"""The recovery benchmark on a tiny model: rows, resuming, and the picture."""

import json

import pytest

from benchmarks.studies import recovery
from tests.samples.stand_ins import load_tiny

SMALL = recovery.Settings(
    steps=1, calibration=(2, 16), training=(3, 16), evaluation=(2, 16), learning_rate=1e-3
)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setattr(recovery, "load_smollm2", load_tiny)


def test_rows_and_resuming(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "rows.json", tmp_path / "rows.svg"
    recovery.run(SMALL, [0], (3, 2), path)
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
    lines = path.with_suffix(".md").read_text().splitlines()
    row = rows["neighbour, mean", 2]
    expected = f"| {row['before']:.1f} -> {row['after']:.1f} |"
    assert next(line for line in lines if line.startswith("| neighbour, mean")).endswith(expected)
    capsys.readouterr()
    after = content["rows"][3]["after"]
    content["rows"][3].update(after=None, seconds=None)  # a run that was stopped here
    path.write_text(json.dumps(content))
    recovery.run(SMALL, [0], (3, 2), path)
    (line,) = capsys.readouterr().out.splitlines()
    row = content["rows"][3]
    assert line.startswith(f"{row['method']}, {row['kv_heads']} KV heads, seed 0: perplexity ")
    assert json.loads(path.read_text())["rows"][3]["after"] == pytest.approx(after)


def test_file_of_other_settings(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"settings": {}, "rows": []}))
    with pytest.raises(ValueError, match="must say what it was made from"):
        recovery.run(SMALL, [0], (3, 2), path)
