"""The benchmark of presses on a tiny model: the same perplexity as kvpress's fake, fewer bytes."""

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress is not installed (it needs transformers before 5.3)")

from benchmarks.studies.pressed import EVEN, FAKED, HEADS, OURS, STOCK, contestants, pictures, run
from tests.tiny_models import VOCABULARY, tiny

CONTEXT, STEPS = 160, 4


def test_rows_and_pictures(tmp_path):
    model = tiny()
    found = contestants(model, [0.5], "auto", window=8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (1, CONTEXT + STEPS + 1), generator=generator)
    for one in found.values():
        one.prefill(ids[:, :CONTEXT])
    measured = run(found, ids[:, CONTEXT:], 2, 2)
    rows = {row["contestant"]: row for row in measured}
    assert list(rows) == [STOCK, OURS, f"{EVEN} 0.5", f"{FAKED} 0.5", f"{HEADS} 0.5"]
    for row in rows.values():
        assert 0 < row["low"] <= row["tokens_per_second"] <= row["high"]
    assert rows[OURS]["perplexity"] == pytest.approx(rows[STOCK]["perplexity"], rel=1e-3)
    faked, real = rows[f"{FAKED} 0.5"], rows[f"{HEADS} 0.5"]
    assert real["perplexity"] == pytest.approx(faked["perplexity"], rel=1e-3)
    assert real["perplexity"] != pytest.approx(rows[STOCK]["perplexity"], rel=1e-3)
    assert faked["kv_bytes"] >= rows[STOCK]["kv_bytes"] > 1.5 * real["kv_bytes"]
    pytest.importorskip("matplotlib")
    drawn = pictures(measured, tmp_path / "pressed.json")
    assert [path.name for path in drawn] == [
        "pressed-memory.svg", "pressed-speed.svg", "pressed-perplexity.svg",
    ]  # fmt: skip
    assert all("AdaKV" in path.read_text() for path in drawn)
