"""The comparison of search methods runs, and its table and JSON say the same."""

import json
import sys

import numpy as np
import pytest

from benchmarks.data.instances import FAMILIES, instance
from benchmarks.studies import search as grouping_search
from gqa_kernels.grouping.objective import as_distances


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["grouping_search", *map(str, arguments)])
    grouping_search.main()
    return capsys.readouterr().out


def test_table_and_json(monkeypatch, capsys, tmp_path):
    np.save(tmp_path / "layer0.npy", instance("euclidean", 7))
    out = tmp_path / "rows.json"
    text = run(monkeypatch, capsys, "--matrix", tmp_path / "layer0.npy", "--groups", 3,
               "--sizes", "1,4", "--json", out)  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert "### layer0 H=7 G=3 1..4 (optimum proved)" in text
    exact = rows[-1]
    assert exact["method"] == "exact" and exact["proved"] and exact["gap_left"] == 0
    for row in rows:
        assert row["gap_left"] >= 0 and row["objective"] >= exact["objective"] - 1e-12
        assert f"| {row['method']} | {row['objective']:.5g} | {row['gap_left']:.1%} |" in text


def test_one_group_leaves_nothing_to_gain(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "--heads", 4, "--groups", 1, "--families", "random")
    assert text.count("0.0%") >= len(grouping_search.RUNS) - 2


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_dissimilarities(family):
    D = instance(family, 9, seed=1)
    np.testing.assert_allclose(as_distances(D), D)
    np.testing.assert_array_equal(D, instance(family, 9, seed=1))
    assert not np.array_equal(D, instance(family, 9, seed=2))
