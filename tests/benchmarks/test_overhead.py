"""The study of host cost: it runs each of its calls, makes rows of them, and compares checkouts."""

from pathlib import Path

import pytest
import torch

from benchmarks.measure.timing import Settings
from benchmarks.report import tables
from benchmarks.report.results import Results
from benchmarks.studies import host_calls, overhead
from gqa_kernels import available_backends

ROOT = Path(__file__).parents[2]
needs_cpu = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="no CPU kernels and no compiler"
)


@needs_cpu
def test_calls_are_attention_with_their_options(monkeypatch):
    monkeypatch.setattr(overhead, "CONTEXTS", (128,))
    found = dict(overhead.groups())
    assert len(found) == 4 + len(overhead.TYPES)
    attention, dense, paged, packed = list(found.values())[:4]
    assert torch.allclose(attention["plain"](0), attention["SDPA"](0), atol=1e-6)
    for calls in (attention, dense, paged, packed):
        assert torch.equal(calls["plain"](0), calls["map as a list"](0))
        for name in {"softcap", "window", "sinks"} & set(calls):
            assert not torch.equal(calls["plain"](0), calls[name](0)), name
    for steps in (dense, paged):
        assert torch.equal(steps["plain"](0), steps["planned"](0))
        assert torch.equal(steps["new tokens"](0), steps["new tokens, planned"](0))
        assert not torch.equal(steps["new tokens"](0), steps["plain"](0))


@needs_cpu
def test_rows_make_a_table():
    title, calls = next(overhead.groups())
    rows = overhead.measure(title, calls, Settings(seconds=0, least=1, warmup_seconds=0))
    table = tables.overhead(Results({}, rows)).splitlines()
    assert len(table) == 2 + len(calls)
    (sdpa,) = (line for line in table if f"| {overhead.SDPA} |" in line)
    assert sdpa.startswith(f"| {title} |") and sdpa.endswith("| 1.00 |")


@needs_cpu
def test_a_child_measures_the_package_it_is_given(tmp_path):
    found = overhead.run_child(ROOT, 0.0)
    expected = {title: list(calls) for title, calls in host_calls.groups()}
    assert {title: list(calls) for title, calls in found.items()} == expected
    assert all(median > 0 for calls in found.values() for median in calls.values())


def test_rounds_alternate_and_ratios_are_of_rounds(monkeypatch, capsys, tmp_path):
    asked = []

    def child(package, seconds):
        asked.append(package)
        return {"group": {"plain": 1e-5 if package == ROOT else 2e-5, "window": 3e-5}}

    monkeypatch.setattr(overhead, "run_child", child)
    (tmp_path / "gqa_kernels").mkdir()
    (tmp_path / "gqa_kernels" / "__init__.py").touch()
    assert overhead.main(["--against", str(tmp_path), "--rounds", "3"]) == 0
    assert asked == [ROOT, tmp_path, tmp_path, ROOT, ROOT, tmp_path]
    plain, window = capsys.readouterr().out.splitlines()[2:]
    assert plain.split()[-1] == "0.50" and window.split()[-1] == "1.00"
    assert " 3.00 " in window


def test_against_needs_a_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--against", str(tmp_path)])
    assert "must be a checkout" in capsys.readouterr().err
