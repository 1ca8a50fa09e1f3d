"""The knapsack over layers against every choice there is."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.data.instances import instance
from gqa_kernels.grouping import Allocation, allocate, search_curve

curves = st.lists(
    st.dictionaries(st.integers(0, 9), st.integers(-5, 20), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(curves, st.integers(0, 40))
def test_brute_force(curves, budget):
    affordable = [c for c in product(*curves) if sum(c) <= budget]
    if not affordable:
        with pytest.raises(ValueError, match=r"budget must be at least \d+ KV heads"):
            allocate(curves, budget)
        return
    costs = {c: sum(curve[h] for curve, h in zip(curves, c, strict=True)) for c in affordable}
    least = min(costs.values())
    result = allocate(curves, budget)
    assert costs[result.num_kv_heads] == result.cost == least
    assert result.total == min(sum(c) for c in affordable if costs[c] == least)


def test_curves_of_search():
    """Never worse than the same number everywhere, and nothing left to gain by moving one head."""
    layers = [search_curve(instance("planted", 8, seed)) for seed in range(4)]
    result = allocate(layers, 12)
    assert result.total <= 12
    assert result.cost <= sum(curve[3].objective for curve in layers)
    everything = allocate(layers, 32)
    assert everything == Allocation((8, 8, 8, 8), 0.0)


@pytest.mark.parametrize(
    ("curves", "budget", "message"),
    [
        ([], 4, "curves must hold at least one layer, got none"),
        ([{1: 0.0}, {}], 4, r"curves\[1\] must hold at least one point, got none"),
        ([{-1: 0.0}], 4, r"curves\[0\] must count KV heads from 0, got -1"),
        ([{2: float("nan")}], 4, r"curves\[0\]\[2\] must be finite, got nan"),
        ([{3: 1.0}, {4: 1.0}], 6, "budget must be at least 7 KV heads for these curves, got 6"),
    ],
)
def test_refused(curves, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(curves, budget)
