"""The search op: its gate, its rows and its table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import run
from benchmarks.data.instances import SearchCase, parse_instance
from benchmarks.ops.search import (
    SearchGate,
    SearchProblem,
    search_backends,
    search_peers,
)
from benchmarks.report import tables
from benchmarks.report.results import Results
from gqa_kernels.grouping import search
from gqa_kernels.grouping.result import SearchResult

CASE = SearchCase("planted", 8, 3, "1..4")


@pytest.fixture(scope="module")
def problem():
    return SearchProblem.build(CASE, torch.device("cpu"))


def test_every_method_passes_and_the_exact_ones_agree(problem):
    gate, proved = SearchGate(problem), []
    for contestant in (*search_backends().values(), *search_peers().values()):
        if contestant.unavailable_reason(torch.device("cpu")) or contestant.name.endswith(
            "00 generations"
        ):
            continue
        prepared = contestant.prepare(problem)
        result = prepared.run(0)
        gate.check(prepared.result(result))
        facts = prepared.facts(result)
        assert facts["objective"] == result.objective <= 2 * facts["random_objective"]
        proved += [result.objective] if result.proved else []
    assert len(proved) >= 3 and np.ptp(proved) < 1e-9 * max(proved)


def other(result: SearchResult, **changes) -> SearchResult:
    """A result with other fields, whatever its own checks say."""
    made = replace(result)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


def test_wrong_results_are_refused(problem):
    exact = search(problem.distances, CASE.groups, "exact", CASE.sizes)
    worse = search(problem.distances, CASE.groups, "neighbour", CASE.sizes)
    assert worse.objective > exact.objective
    for wrong, message in [
        (other(exact, labels=exact.labels[:-1]), "labels: 7, not 8"),
        (other(exact, labels=(0, 0, 0, 1, 1, 1, 1, 1)), "groups: sizes"),
        (other(exact, labels=(0, 0, 0, 0, 0, 1, 1, 2)), "sizes .5, 2, 1.: 1..4"),
        (other(exact, objective=0.9 * exact.objective), "objective: .* of the labels"),
        (other(worse, lower_bound=worse.objective), "lower bound .* is above a partition"),
        (other(worse, proved=True), "proved .* is known"),
    ]:
        with pytest.raises(AssertionError, match=message):
            SearchGate(problem).check(wrong)
    SearchGate(problem).check(worse)


def test_a_partition_below_a_proved_optimum_unmasks_it(problem):
    gate = SearchGate(problem)
    exact = search(problem.distances, CASE.groups, "exact", CASE.sizes)
    gate.best = gate.proved = exact.objective * 1.1
    with pytest.raises(AssertionError, match="before"):
        gate.check(exact)
    with pytest.raises(AssertionError, match="below the optimum"):
        gate.check(other(exact, proved=False))


def test_shapes():
    assert parse_instance("planted:8:3:1..4") == CASE and CASE.sizes == (1, 4)
    assert parse_instance("random:9:3").sizes == "free"
    with pytest.raises(ValueError, match="must divide 9 heads"):
        SearchCase("random", 9, 2, "equal").check()


def test_command_line_and_table(tmp_path: Path):
    path = tmp_path / "out.json"
    arguments = ["--op", "search", "--shapes", "planted:8:3", "--device", "cpu"]
    arguments += ["--backend", "exact", "--peer", "neighbour", "Ward", "--seconds", "0.01"]
    assert run.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["exact", "neighbour", "Ward"]
    assert all(row["status"] == "ok" and row["median"] > 0 for row in rows)
    assert "bytes" not in rows[0] and "tokens_per_second" not in rows[0]
    table = tables.searches(Results.load(path)).splitlines()
    assert "planted H=8 G=3 free" in table[0]
    assert "proved optimal" in table[2] and "% left" in table[3]
