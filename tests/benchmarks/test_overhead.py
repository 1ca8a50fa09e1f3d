"""The benchmark of calls: it runs each of them, and its rows make a table."""

import pytest
import torch

from benchmarks import overhead, tables
from benchmarks.results import Results
from benchmarks.timing import Settings
from gqa_kernels import available_backends


@pytest.mark.skipif("cpu" not in available_backends(), reason="no CPU kernels and no compiler")
def test_calls_give_attention_and_rows_a_table(monkeypatch):
    monkeypatch.setattr(overhead, "CONTEXTS", (128,))
    monkeypatch.setattr(overhead, "BATCHES", (1,))
    overhead.build.load()
    found = dict(overhead.groups())
    assert len(found) == 1 + len(overhead.TYPES) + 2
    title, calls = next(iter(found.items()))
    one = calls[overhead.SDPA](0)
    assert torch.allclose(calls["asym_gqa_attention"](0), one)
    assert torch.allclose(calls["op plain_attention_forward"](0), one)
    for steps in list(found.values())[-2:]:
        assert torch.equal(steps["decode"](0), steps["decode, planned"](0))
        stepped = steps["append and decode"](0)
        assert torch.equal(stepped, steps["append and decode, planned"](0))
        assert not torch.equal(stepped, steps["decode"](0))

    rows = overhead.measure(title, calls, Settings(seconds=0, least=1, warmup_seconds=0))
    table = tables.overhead(Results({}, rows)).splitlines()
    assert len(table) == 2 + len(calls)
    (sdpa,) = (line for line in table if f"| {overhead.SDPA} |" in line)
    assert sdpa.startswith(f"| {title} |") and sdpa.endswith("| 1.00 |")
