"""The exact methods: against brute force, against each other, and at the sizes of real models."""

import time
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data.instances import FAMILIES, instance
from gqa_kernels import HeadMap
from gqa_kernels.grouping import search, search_curve, search_groups, search_groups_curve
from gqa_kernels.grouping.objective import group_cost
from gqa_kernels.grouping.search import column_generation
from gqa_kernels.grouping.search.bounds import nearest_bound, semidefinite_bound
from gqa_kernels.grouping.search.columns import Columns, number_of_groups
from gqa_kernels.grouping.search.cuts import cut_rows, violated
from gqa_kernels.grouping.search.problem import Problem
from tests.grouping.brute_force import allowed, cost, optima, partitions

EXACT = ("subset_dp", "column_generation", "exact")
SIZES = ("free", "equal", (1, 3), (2, 4), (2, 2))


def check(result, D, num_groups, sizes, method):
    """A feasible, proved result whose objective is what its labels cost."""
    assert len(result.labels) == len(D) and result.num_groups == num_groups
    assert allowed(result.labels, sizes)
    assert result.objective == pytest.approx(cost(D, result.labels), abs=1e-12)
    assert result.lower_bound <= result.objective and result.proved
    assert (result.method, result.sizes) == (method, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("H", [1, 2, 5, 6, 8])
def test_brute_force(H, method, sizes):
    D = instance("random" if H % 2 else "euclidean", H, seed=H)
    expected = optima(D, sizes)
    if not expected:
        with pytest.raises(ValueError, match="sizes must allow some number of groups"):
            search_curve(D, method, sizes)
        return
    curve = search_curve(D, method, sizes)
    assert curve.keys() == expected.keys()
    for G, result in curve.items():
        check(result, D, G, sizes, method)
        assert result.objective == pytest.approx(expected[G], abs=1e-12)


@settings(max_examples=15)
@given(st.integers(2, 7), st.sampled_from(SIZES), st.data())
def test_brute_force_with_ties(H, sizes, data):
    """Few distinct distances, many of them zero: degenerate programs and equal optima."""
    upper = data.draw(st.lists(st.integers(0, 3), min_size=H * H, max_size=H * H))
    D = np.triu(np.array(upper, float).reshape(H, H), 1)
    D += D.T
    for G, best in optima(D, sizes).items():
        for method in EXACT:
            result = search(D, G, method, sizes)
            check(result, D, G, sizes, method)
            assert result.objective == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("H", "G", "sizes"), [(12, 4, "free"), (13, 5, (1, 4)), (14, 7, "equal"), (16, 4, "equal")]
)
def test_dp_equals_column_generation(family, H, G, sizes):
    D = instance(family, H, seed=H)
    dp, cg = (search(D, G, method, sizes) for method in ("subset_dp", "column_generation"))
    check(dp, D, G, sizes, "subset_dp")
    check(cg, D, G, sizes, "column_generation")
    assert dp.objective == pytest.approx(cg.objective, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_h32_equal(family):
    D = instance(family, 32)
    result = search(D, 8, sizes="equal")
    check(result, D, 8, "equal", "exact")
    assert result.objective <= search(D, 8, "align", "equal", restarts=20).objective + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("H", "G", "sizes", "seconds"), [(32, 8, (1, 6), 10), (64, 16, "equal", 15)], ids=str
)
def test_real_sizes_in_time(family, H, G, sizes, seconds):
    D = instance(family, H)
    started = time.process_time()
    result = search(D, G, sizes=sizes)
    assert time.process_time() - started < seconds
    check(result, D, G, sizes, "exact")
    assert result.objective <= search(D, G, "local", sizes).objective * (1 + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("H", "G", "sizes"), [(17, 5, "free"), (18, 6, (2, 5))], ids=str)
def test_dp_equals_column_generation_at_its_limit(H, G, sizes):
    D = instance("aligned_cosine", H)
    dp, cg = (search(D, G, method, sizes) for method in ("subset_dp", "column_generation"))
    assert dp.proved and cg.proved
    assert dp.objective == pytest.approx(cg.objective, rel=1e-9)


def test_cuts_and_fixing_keep_the_optimum(monkeypatch):
    """With every threshold at its least, the small problem takes the large problem's path."""
    from gqa_kernels.grouping.search import set_partitioning

    for name, value in {"_FEW": 10, "_FIRST_POOL": 20, "_ADDED": 5, "_CUTS": 3}.items():
        monkeypatch.setattr(set_partitioning, name, value)
    monkeypatch.setattr(set_partitioning, "_PROMISING", 30)
    cuts = []
    real = set_partitioning.violated
    monkeypatch.setattr(
        set_partitioning, "violated", lambda *args: cuts.append(real(*args)) or cuts[-1]
    )
    for seed in range(12):
        D = instance("random" if seed % 2 else "planted", 15, seed)
        sizes = ("equal", (2, 4))[seed % 2]
        cg = search(D, 5, "column_generation", sizes)
        assert cg.proved
        assert cg.objective == pytest.approx(search(D, 5, "subset_dp", sizes).objective, rel=1e-9)
    assert sum(map(len, cuts)) > 0


def test_columns_are_all_groups():
    D = instance("random", 7)
    columns = Columns.enumerate(D, 2, 4)
    assert len(columns) == number_of_groups(7, 2, 4) == 21 + 35 + 35
    groups = [tuple(int(h) for h in column if h < 7) for column in columns.members.T]
    assert len(set(groups)) == len(groups) and all(list(g) == sorted(set(g)) for g in groups)
    prices = np.arange(7) / 3
    reduced = columns.reduced_costs(prices)
    for group, price, value in zip(groups, columns.costs, reduced, strict=True):
        assert price == pytest.approx(D[np.ix_(group, group)].sum() / 2 / len(group))
        assert value == pytest.approx(price - prices[list(group)].sum())
    covered = columns.incidence().toarray()
    assert [tuple(np.flatnonzero(c).tolist()) for c in covered.T] == groups


def test_cut_rows_count_two_of_three():
    columns = Columns.enumerate(instance("random", 5), 1, 3)
    triple = np.array([[0, 2, 3]])
    groups = [set(c[c < 5].tolist()) for c in columns.members.T]
    row = cut_rows(columns, triple).toarray()[0]
    assert row.tolist() == [float(len(g & {0, 2, 3}) >= 2) for g in groups]
    halves = np.array([0.5 * (g in ({0, 2}, {2, 3}, {0, 3})) for g in groups])
    assert violated(columns, halves, 5).tolist() == triple.tolist()  # three halves exceed 1


@pytest.mark.parametrize("family", FAMILIES)
def test_bound_without_columns(family):
    for G, sizes in ((4, "equal"), (3, "free"), (5, (2, 3))):
        problem = Problem.create(instance(family, 12), G, sizes)
        optimum = search(problem.distances, G, sizes=sizes).objective
        assert 0 < nearest_bound(problem) <= optimum * (1 + 1e-12)
        found = semidefinite_bound(problem, 1.1 * optimum)
        assert nearest_bound(problem) < found <= optimum * (1 + 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_semidefinite_bound_is_close(family):
    """Where the groups are too many to list, the gap stays small (independent entries excepted)."""
    result = search(instance(family, 24), 6, "column_generation", max_columns=10)
    assert result.lower_bound > (0.75 if family == "random" else 0.93) * result.objective


def test_too_many_groups_to_list():
    D = instance("aligned_cosine", 20)
    result = search(D, 5, "column_generation", max_columns=100)
    assert not result.proved and 0 < result.lower_bound < result.objective
    full = search(D, 5, "column_generation")
    assert full.proved and result.lower_bound <= full.objective <= result.objective


@pytest.mark.parametrize("limit", [1e-6, 0.05, 0.4])
def test_time_limit(limit):
    """A valid partition and a valid bound whenever time runs out."""
    D = instance("random", 48)
    started = time.perf_counter()
    result = search(D, 12, sizes="equal", time_limit=limit)
    assert time.perf_counter() - started < limit + 5
    assert allowed(result.labels, "equal") and result.num_groups == 12
    assert 0 <= result.lower_bound <= result.objective


def test_dp_refuses_many_heads():
    with pytest.raises(ValueError, match="D must have at most 18 heads for the subset DP, got 19"):
        search(instance("random", 19), 3, "subset_dp")


def test_identical_heads_cost_nothing():
    """Three KV heads, each expanded to three heads and shuffled: recovered with zero error."""
    order = np.random.default_rng(3).permutation(np.repeat(np.arange(3), 3))
    base = instance("euclidean", 3)
    result = search(base[np.ix_(order, order)], 3)
    assert result.objective == 0 and result.proved
    assert all((result.labels[i] == result.labels[j]) == (order[i] == order[j])
               for i in range(9) for j in range(9))  # fmt: skip
    large = np.random.default_rng(3).permutation(np.repeat(np.arange(8), 3))
    base = instance("euclidean", 8)
    result = search(base[np.ix_(large, large)], 8, sizes=(1, 4))
    assert result.objective == 0 and result.proved
    assert column_generation.MAX_COLUMNS >= 1_149_016  # H = 32 with groups of up to 6


class TestGroupCosts:
    """search_groups() against brute force over costs that are no sum over pairs."""

    @staticmethod
    def costs(H, seed=0):
        values = np.random.default_rng(seed).random(1 << H)
        return lambda heads: float(values[sum(1 << h for h in heads)])

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("H", [1, 4, 7])
    def test_brute_force(self, H, sizes):
        cost = self.costs(H)
        best = {}
        for labels in partitions(H):
            if allowed(labels, sizes):
                groups = [[h for h in range(H) if labels[h] == g] for g in set(labels)]
                total = sum(cost(tuple(group)) for group in groups)
                best[len(groups)] = min(best.get(len(groups), np.inf), total)
        for G in range(1, H + 1):
            if G not in best:
                with pytest.raises(ValueError, match="groups"):
                    search_groups(cost, H, G, sizes)
                continue
            found = search_groups(cost, H, G, sizes)
            assert allowed(found.labels, sizes) and found.num_groups == G and found.proved
            assert found.objective == pytest.approx(best[G])
            assert found.objective == pytest.approx(sum(map(cost, found.head_map.groups)))

    def test_pair_costs_give_what_search_gives(self):
        D = instance("euclidean", 9)
        found = search_groups(lambda heads: group_cost(D, heads), 9, 3)
        assert found.labels == search(D, 3).labels

    @pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
    def test_cost_that_is_no_cost(self, value):
        with pytest.raises(ValueError, match="cost must be finite and non-negative, got"):
            search_groups(lambda heads: value, 4, 2)

    def test_curve_is_every_search(self):
        cost = self.costs(6)
        for G, found in search_groups_curve(cost, 6).items():
            assert found.objective == pytest.approx(search_groups(cost, 6, G).objective)
            assert found.num_groups == G and found.proved

    def test_curve_beyond_what_can_be_listed(self):
        """Of sums over pairs the merges are Ward's; of any costs it is what the labels cost."""
        D = instance("euclidean", 14)
        ward = search_curve(D, "hierarchical")
        for G, found in search_groups_curve(lambda heads: group_cost(D, heads), 14).items():
            assert found.labels == ward[G].labels
            assert found.objective == pytest.approx(ward[G].objective)
            assert found.proved == (G == 14)
        cost = self.costs(9)
        curve = search_groups_curve(cost, 9, exhaustive=4, fewest=3)
        assert list(curve) == [3, 4, 5, 6, 7, 8, 9]
        for G, found in curve.items():
            assert found.num_groups == G
            assert found.objective == pytest.approx(sum(map(cost, found.head_map.groups)))

    def test_patience_costs_fewer_groups(self):
        D = instance("euclidean", 16)
        counted = []
        cost = cache(lambda heads: counted.append(heads) or group_cost(D, heads))
        found = search_groups(cost, 16, 4, patience=10)
        assert found.objective <= 1.001 * search(D, 4, "local").objective
        assert len(counted) < 16 * 15 / 2 + 100

    def test_estimates_of_pairs_are_not_taken_for_costs(self):
        D = instance("euclidean", 14)
        rough = D / 2 * np.random.default_rng(0).uniform(0.8, 1.2)
        cost = lambda heads: group_cost(D, heads)  # noqa: E731
        for found in search_groups_curve(cost, 14, pairs=rough).values():
            assert found.objective == pytest.approx(sum(map(cost, found.head_map.groups)))
        found = search_groups(cost, 14, 5, pairs=rough)
        assert found.objective <= 1.01 * search(D, 5).objective

    @pytest.mark.parametrize("sizes", ["free", "equal", (1, 3)])
    def test_descent_beyond_what_can_be_listed(self, sizes):
        """No move or swap within the size rule improves it, and no start is better."""
        cost = self.costs(8)
        start = [0, 1, 2, 3] * 2
        found = search_groups(cost, 8, 4, sizes, starts=[start], exhaustive=4)
        assert allowed(found.labels, sizes) and found.num_groups == 4
        assert not found.proved and found.lower_bound == 0
        assert found.objective == pytest.approx(sum(map(cost, found.head_map.groups)))
        for labels in (start, [0, 0, 1, 1, 2, 2, 3, 3]):
            assert found.objective <= sum(map(cost, HeadMap(labels).groups))
        for i, j in combinations(range(8), 2):
            swapped = list(found.labels)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            moved = [*found.labels[:i], found.labels[j], *found.labels[i + 1 :]]
            for labels in (swapped, moved):
                if len(set(labels)) == 4 and allowed(labels, sizes):
                    total = sum(map(cost, HeadMap(labels).groups))
                    assert found.objective <= total * (1 + 1e-8)

    def test_start_with_another_number_of_groups(self):
        with pytest.raises(ValueError, match="starts must be partitions of 8 heads into 4 groups"):
            search_groups(self.costs(8), 8, 4, starts=[[0, 1] * 4], exhaustive=4)

    @pytest.mark.parametrize(("H", "G"), [(0, 1), (4, 5), (4, 0)])
    def test_counts(self, H, G):
        with pytest.raises(ValueError, match="must"):
            search_groups(self.costs(4), H, G)
