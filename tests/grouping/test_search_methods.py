"""Every method: valid results whatever the instance and the rule; each method's own promises."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data.instances import FAMILIES, instance
from gqa_kernels import HeadMap
from gqa_kernels.grouping import METHODS, SearchResult, search, search_curve
from gqa_kernels.grouping.search import descent, nsga2, partitions
from gqa_kernels.grouping.search.hierarchical import LINKAGES
from gqa_kernels.grouping.search.key_norm import key_norm_sizes
from gqa_kernels.grouping.search.problem import Problem
from tests.grouping.brute_force import allowed, cost, sizes_of

FAST = {"local": {"starts": 4, "rounds": 2}, "align": {"restarts": 3, "swaps": 50}}
FAST["nsga2"] = {"generations": 2, "population": 8}


def options(method, num_groups):
    if method == "key_norm":
        return {"norms": np.arange(num_groups) + 0.5}
    if method == "nsga2":
        pytest.importorskip("pymoo")
    return FAST.get(method, {})


def rule_for(data, H):
    """A number of groups and a size rule that fit H heads."""
    G = data.draw(st.integers(1, H), label="G")
    lo = data.draw(st.integers(1, H // G), label="lo")
    hi = data.draw(st.integers(-(-H // G), H), label="hi")
    return G, data.draw(st.sampled_from(["free", (lo, hi)] + ["equal"] * (H % G == 0)))


@settings(max_examples=25)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 11), st.integers(0, 99), st.data())
def test_results_are_valid(family, H, seed, data):
    D = instance(family, H, seed)
    before = D.copy()
    G, sizes = rule_for(data, H)
    best = search(D, G, "subset_dp", sizes).objective
    for method in METHODS:
        result = search(D, G, method, sizes, seed, **options(method, G))
        assert result.num_groups == G and len(result.labels) == H
        assert allowed(result.labels, sizes)
        assert result.objective == pytest.approx(cost(D, result.labels), abs=1e-12)
        assert 0 <= result.lower_bound <= result.objective
        assert result.objective >= best - 1e-9 and result.lower_bound <= best + 1e-9
        assert not result.proved or result.objective == pytest.approx(best, abs=1e-8)
        assert result.head_map == HeadMap(result.labels)
    np.testing.assert_array_equal(D, before)


@settings(max_examples=25)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(2, 12), st.integers(0, 99), st.data())
def test_optimum_ignores_the_order_of_heads(family, H, seed, data):
    D = instance(family, H, seed)
    G, sizes = rule_for(data, H)
    order = np.random.default_rng(seed).permutation(H)
    shuffled = search(D[np.ix_(order, order)], G, sizes=sizes)
    original = search(D, G, sizes=sizes)
    assert shuffled.objective == pytest.approx(original.objective, abs=1e-9)
    scaled = search(1000 * D, G, sizes=sizes)
    assert scaled.objective == pytest.approx(1000 * original.objective, abs=1e-6)


@settings(max_examples=25)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 12), st.integers(0, 99))
def test_curves(family, H, seed):
    """One more group never costs more where groups may be single; equal sizes cost least along
    divisors; a tighter rule never costs less."""
    D = instance(family, H, seed)
    free = search_curve(D)
    assert list(free) == list(range(1, H + 1))
    assert free[H].objective == 0
    assert free[1].objective == pytest.approx(D.sum() / 2 / H)
    capped = search_curve(D, sizes=(1, 3))
    for curve in (free, capped):
        for G in curve:
            if G + 1 in curve:
                assert curve[G + 1].objective <= curve[G].objective + 1e-9
    equal = search_curve(D, sizes="equal")
    assert list(equal) == [G for G in range(1, H + 1) if H % G == 0]
    for G in equal:
        assert all(equal[F].objective <= equal[G].objective + 1e-9 for F in equal if F % G == 0)
    for tight in (equal, capped):
        assert all(tight[G].objective >= free[G].objective - 1e-9 for G in tight)


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides(method):
    D = instance("random", 10)
    runs = [search(D, 3, method, seed=5, **options(method, 3)).labels for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("method", ["neighbour", "hierarchical", "local", "asymgqa"])
def test_curve_of_any_method(method):
    D = instance("euclidean", 9)
    for G, result in search_curve(D, method, (1, 4), **FAST.get(method, {})).items():
        single = search(D, G, method, (1, 4), **FAST.get(method, {}))
        assert (single.labels, single.objective) == (result.labels, result.objective)


def test_neighbour_is_ordinary_gqa():
    D = instance("random", 12)
    assert search(D, 4, "neighbour").head_map == HeadMap.uniform(12, 4)
    assert sizes_of(search(D, 5, "neighbour").labels) == [3, 3, 2, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", ["free", "equal", (2, 5)], ids=str)
def test_local_finds_small_optima(family, sizes):
    D = instance(family, 14)
    G = 7 if sizes == "equal" else 4
    best = search(D, G, "subset_dp", sizes).objective
    assert search(D, G, "local", sizes).objective == pytest.approx(best, rel=1e-9)


def test_descent_ends_where_no_move_or_swap_gains():
    D = instance("random", 9)
    problem = Problem.create(D, 3, (2, 4))
    rng = np.random.default_rng(0)
    starts = np.stack([partitions.random_balanced(problem, rng) for _ in range(5)])
    for labels in descent.descend(problem, starts).tolist():
        here = cost(D, labels)
        for h in range(9):
            for g in range(3):
                moved = [*labels[:h], g, *labels[h + 1 :]]
                if allowed(moved, (2, 4)) and len(set(moved)) == 3:
                    assert cost(D, moved) >= here - 1e-9
            for k in range(h):
                swapped = labels.copy()
                swapped[h], swapped[k] = swapped[k], swapped[h]
                assert cost(D, swapped) >= here - 1e-9
    kept = descent.descend(problem, starts, moves=False)
    assert all(sorted(sizes_of(a)) == sorted(sizes_of(b))
               for a, b in zip(kept.tolist(), starts.tolist(), strict=True))  # fmt: skip


def test_ward_merges_what_raises_the_objective_least():
    D = instance("random", 8)
    labels = list(range(8))
    for G in range(7, 0, -1):
        merged = [[a if x == b else x for x in labels] for a in set(labels) for b in set(labels)
                  if a < b]  # fmt: skip
        labels = min(merged, key=lambda each: cost(D, each))
        result = search(D, G, "hierarchical")
        assert result.objective == pytest.approx(cost(D, labels))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_linkages_recover_far_clusters(linkage):
    points = np.repeat([0.0, 10.0, 30.0], [4, 1, 3]) + np.arange(8) / 100
    D = (points[:, None] - points) ** 2
    assert search(D, 3, "hierarchical", linkage=linkage).labels == (0, 0, 0, 0, 1, 2, 2, 2)
    capped = search(D, 3, "hierarchical", (1, 3), linkage=linkage)
    assert max(capped.group_sizes) == 3


def test_asymgqa_keeps_sizes_unless_uneven():
    D = instance("planted", 12)
    sizes = {sizes_kept(search(D, 4, "asymgqa", seed=s, iterations=200)) for s in range(5)}
    assert sizes == {(3, 3, 3, 3)}
    uneven = [search(D, 4, "asymgqa_uneven", seed=s, iterations=200) for s in range(5)]
    assert any(sizes_kept(r) != (3, 3, 3, 3) for r in uneven)
    assert all(
        sizes_kept(search(D, 4, "asymgqa_uneven", "equal", s)) == (3, 3, 3, 3) for s in range(3)
    )


def sizes_kept(result):
    return tuple(sorted(result.group_sizes))


def test_more_asymgqa_steps_never_hurt():
    D = instance("aligned_cosine", 16)
    values = [search(D, 4, "asymgqa", iterations=n).objective for n in (0, 10, 200, 2000)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_key_norm_sizes():
    assert key_norm_sizes([1, 2, 4], 12) == [0, 3, 9]  # KDGQA starves the smallest norm
    assert key_norm_sizes([1, 2, 4], 12, lo=1) == [1, 3, 8]
    assert key_norm_sizes([1, 2, 4], 14, "dgqa") == [2, 4, 8]
    assert key_norm_sizes([3, 3, 3], 8) == [3, 3, 2]
    assert key_norm_sizes([0, 1], 6, hi=4) == [2, 4]
    D = instance("random", 12)
    assert sizes_kept(search(D, 3, "key_norm", norms=[4, 1, 2])) == (1, 3, 8)
    assert sizes_kept(search(D, 3, "key_norm", norms=[4, 1, 2], rule="dgqa")) == (2, 3, 7)


def test_nsga2_layers():
    pytest.importorskip("pymoo")
    errors = [5.0, 1.0, 3.0, 0.5]
    front = nsga2.convert_layers(12, [4, 4, 6, 3], errors, generations=40, population=40)
    totals = [(heads, error) for heads, error, _ in front]
    assert totals[0] == (4 + 4 + 6 + 3, 9.5) and totals[-1] == (48, 0.0)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(totals))
    for heads, error, converted in front:
        spent = [small if c else 12 for small, c in zip([4, 4, 6, 3], converted, strict=True)]
        assert heads == sum(spent)
        assert error == pytest.approx(sum(e for e, c in zip(errors, converted, strict=True) if c))


def test_nsga2_without_pymoo(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(ImportError, match="must have pymoo"):
        search(instance("random", 4), 2, "nsga2")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_groups": 0}, ValueError, r"num_groups must lie in \[1, 6\], got 0"),
        ({"num_groups": 7}, ValueError, r"num_groups must lie in \[1, 6\], got 7"),
        ({"num_groups": 2.5}, TypeError, "num_groups must be an integer, got 2.5"),
        ({"num_groups": 4, "sizes": "equal"}, ValueError, "num_groups must divide 6 heads"),
        ({"sizes": "even"}, ValueError, 'sizes must be "free", "equal" or .*, got \'even\''),
        ({"sizes": (1, 2, 3)}, ValueError, r"sizes must be .*, got \(1, 2, 3\)"),
        ({"sizes": (0, 3)}, ValueError, r"sizes must be .* 1 <= lo <= hi, got \(0, 3\)"),
        ({"sizes": (3, 2)}, ValueError, r"sizes must be .* 1 <= lo <= hi, got \(3, 2\)"),
        ({"sizes": (1, 2)}, ValueError, r"sizes must let 2 groups hold 6 heads"),
        ({"sizes": (4, 6)}, ValueError, r"sizes must let 2 groups hold 6 heads"),
        ({"method": "magic"}, ValueError, "method must be one of neighbour, .*, got 'magic'"),
        ({"time_limit": 0}, ValueError, "time_limit must be positive seconds or None, got 0"),
        ({"starts": 3}, TypeError, r"options of method 'exact' must be among \[\], got 'starts'"),
        ({"method": "key_norm"}, TypeError, "method 'key_norm' must be given norms="),
        ({"method": "key_norm", "norms": [1]}, ValueError, "norms must have 2 entries, got 1"),
        ({"method": "key_norm", "norms": [1, -1]}, ValueError, "norms must be finite"),
        ({"method": "key_norm", "norms": [1, 2], "rule": "x"}, ValueError, "rule must be one of"),
        ({"method": "hierarchical", "linkage": "x"}, ValueError, "linkage must be one of"),
        ({"method": "local", "starts": 0}, ValueError, "starts must be >= 1"),
        ({"method": "align", "restarts": 0}, ValueError, "restarts must be >= 1"),
        ({"method": "nsga2", "generations": 0}, ValueError, "generations must be >= 1"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        search(instance("random", 6), **{"num_groups": 2, **arguments})


def test_result_round_trips_through_json():
    for sizes in ("free", (1, 4)):
        result = search(instance("random", 7), 3, sizes=sizes)
        assert SearchResult.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match="SearchResult JSON must be an object with labels"):
        SearchResult.from_json("[]")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": (1, 0)}, "labels must number the groups by first appearance"),
        ({"labels": ()}, "labels must number the groups by first appearance"),
        ({"lower_bound": 2.0}, r"lower_bound must be at most objective \(1.0\), got 2.0"),
        ({"objective": float("nan")}, "objective must be finite, got nan"),
    ],
)
def test_result_refuses(fields, message):
    good = {"labels": (0, 1), "objective": 1.0, "lower_bound": 0.0, "proved": False,
            "seconds": 0.1, "method": "local", "sizes": "free"}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        SearchResult(**{**good, **fields})
