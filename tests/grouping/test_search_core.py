"""The compiled core of the search takes the same steps as the numpy code, bit for bit."""

import numpy as np
import pytest

from gqa_kernels.grouping.search import core, search
from gqa_kernels.grouping.search.columns import Columns, number_of_groups
from gqa_kernels.grouping.search.descent import descend
from gqa_kernels.grouping.search.partitions import random_balanced, repair
from gqa_kernels.grouping.search.problem import Problem
from gqa_kernels.native.search_core import search_core
from tests.grouping.brute_force import cost


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if search_core() is None:
        pytest.skip("the core can't be compiled here")


def heads(H, seed=0):
    points = np.random.default_rng(seed).normal(size=(H, 12))
    return ((points[:, None] - points) ** 2).sum(-1)


def ties(H, seed=0):
    """Distances of 1 and 2: many steps gain the same."""
    D = np.random.default_rng(seed).integers(1, 3, size=(H, H))
    D = np.triu(D, 1)
    return (D + D.T).astype(float)


def both(monkeypatch, run):
    """What a function returns with the core, and with numpy."""
    found = run()
    with monkeypatch.context() as patch:
        patch.setattr(core, "search_core", lambda: None)
        return found, run()


@pytest.mark.parametrize("make", [heads, ties])
@pytest.mark.parametrize("sizes", ["free", "equal", (2, 7)])
@pytest.mark.parametrize(
    "method", ["local", "align", "exact", "hierarchical", "subset_dp", "column_generation"]
)
def test_methods_find_the_same(monkeypatch, method, sizes, make):
    H = 16 if method in ("exact", "subset_dp") else 20
    limits = (1, 6) if (method, sizes) == ("column_generation", "free") else sizes
    run = lambda: search(make(H), 4, method, sizes=limits)  # noqa: E731
    found, expected = both(monkeypatch, run)
    assert found.labels == expected.labels
    assert (found.objective, found.lower_bound) == (expected.objective, expected.lower_bound)
    assert found.objective == pytest.approx(cost(make(H), found.labels))


@pytest.mark.parametrize("moves", [True, False])
def test_descent(monkeypatch, moves):
    problem = Problem.create(heads(24), 5)
    rng = np.random.default_rng(1)
    starts = np.stack([random_balanced(problem, rng) for _ in range(9)])
    before = starts.copy()
    found, expected = both(monkeypatch, lambda: descend(problem, starts, moves))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(starts, before)
    assert (found != starts).any()


def test_repair(monkeypatch):
    problem = Problem.create(heads(24), 6, (3, 5))
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(4, size=24)
        found, expected = both(monkeypatch, lambda labels=labels: repair(problem, labels))
        np.testing.assert_array_equal(found, expected)
        assert np.bincount(found).min() >= 3 and np.bincount(found).max() <= 5


@pytest.mark.parametrize("lo, hi", [(1, 3), (4, 4), (2, 5), (13, 13)])
def test_columns_and_their_prices(monkeypatch, lo, hi):
    D = heads(13)
    found, expected = both(monkeypatch, lambda: Columns.enumerate(D, lo, hi))
    assert len(found) == number_of_groups(13, lo, hi)
    np.testing.assert_array_equal(found.members, expected.members)
    np.testing.assert_array_equal(found.costs, expected.costs)
    prices = np.random.default_rng(2).normal(size=13)
    np.testing.assert_array_equal(*both(monkeypatch, lambda: expected.reduced_costs(prices)))


def test_a_deadline_stops_the_descent():
    problem = Problem.create(heads(32), 8, time_limit=1e-9)
    starts = np.stack([random_balanced(problem, np.random.default_rng(0))])
    np.testing.assert_array_equal(descend(problem, starts), starts)


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("GQA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("GQA_KERNELS_BUILD", "0")
    search_core.cache_clear()
    try:
        assert search_core() is None
        assert search(heads(14), 3, "local").objective > 0
    finally:
        search_core.cache_clear()


def test_a_compiler_that_fails_leaves_numpy(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GQA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/none/such")
    search_core.cache_clear()
    try:
        assert search_core() is None
        assert "/none/such" in capsys.readouterr().err
    finally:
        search_core.cache_clear()
