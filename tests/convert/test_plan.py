"""plan(): maps for all layers; files; pictures."""

import json

import numpy as np
import pytest

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.convert.plan import Plan, plan
from gqa_kernels.grouping import allocate, calibrate, layer_errors, search, similarity
from gqa_kernels.integrations.transformers import register
from tests import tiny_families
from tests.tiny_models import batch, tiny

PAIRS = {"kind": "functional", "sizes": "free"}


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture(scope="module")
def model():
    return tiny(num_kv_heads=6)


@pytest.fixture(scope="module")
def stats(model):
    return calibrate(model, [batch([16, 12], "right", seed=seed) for seed in range(4)])


def test_layers_are_searched_one_by_one_and_side_by_side(model, stats):
    found = plan(model, stats, 3, **PAIRS)
    for index, layer in enumerate(found.layers):
        for side, result in (("k", layer.key), ("v", layer.value)):
            D = similarity(model, stats, index, side, "functional").array
            assert result.labels == search(D, 3).labels
            assert result.proved
            assert found.curves[index][side][3] == pytest.approx(result.objective)
    assert found.maps == [layer.maps for layer in found.layers]
    assert any(key != value for key, value in found.maps)


def test_shared_maps(model, stats):
    assert all(key == value for key, value in plan(model, stats, 3, shared=True, **PAIRS).maps)


@pytest.mark.parametrize("groups", [2, 4])
def test_equal_sizes_where_heads_do_not_divide_are_as_equal_as_can_be(model, stats, groups):
    for maps in plan(model, stats, groups, kind="functional", sizes="equal").maps:
        for head_map in maps:
            assert max(head_map.group_sizes) - min(head_map.group_sizes) <= 1


@pytest.mark.parametrize("shared", [False, True])
def test_budget_is_spent_where_it_helps_most(model, stats, shared):
    found = plan(model, stats, budget=14, shared=shared, **PAIRS)
    curves = [curve for layer in found.curves for curve in layer.values()]
    best = allocate(curves, 7 if shared else 14)
    counts = [head_map.num_kv_heads for maps in found.maps for head_map in maps]
    assert sum(counts) <= 14
    assert counts[:: 1 + shared] == list(best.num_kv_heads)


def test_auto_takes_the_lowest_held_out_error(model, stats):
    held_out = [batch([16], "right", seed=9)]
    found = plan(model, stats, 2, kind="functional", held_out=held_out, merging="mean")
    for rule in ("free", "equal"):
        maps = plan(model, stats, 2, kind="functional", sizes=rule).maps
        child = convert(model, maps, "mean")
        child.set_attn_implementation("asym_gqa")
        errors = layer_errors(model, child, held_out)
        for layer, error in zip(found.layers, errors, strict=True):
            assert layer.error <= error * (1 + 1e-6)
    child = convert(model, found.maps, "mean", moments=stats, restore_norms=found.restore_norms)
    child.set_attn_implementation("asym_gqa")
    assert [layer.error for layer in found.layers] == pytest.approx(
        layer_errors(model, child, held_out), rel=1e-4
    )


def test_many_heads_have_curves_of_linkage():
    model = tiny(num_heads=20, num_kv_heads=20, num_hidden_layers=1)
    options = {"kind": "weight", "sizes": "free", "merging": "mean"}
    found = plan(model, None, 10, method="hierarchical", **options)
    assert set(found.curves[0]["k"]) == set(range(1, 21))
    assert found.layers[0].key.num_groups == 10
    assert found.layers[0].key.method == "hierarchical"


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_other_families(family):
    model = tiny_families.tiny(family)
    given = tiny_families.inputs(family)
    found = plan(model, calibrate(model, [given]), 2, held_out=[given])
    child = convert(model, found.maps, found.merging, moments=calibrate(model, [given]))
    child.set_attn_implementation("asym_gqa")
    assert tiny_families.output(child, given).isfinite().all()


@pytest.mark.parametrize("kind", ["loss", "functional"])
def test_round_trip(model, stats, tmp_path, kind):
    held_out = [batch([16], "right", seed=9)]
    found = plan(model, stats, 2, kind=kind, held_out=held_out)
    assert Plan.load(found.save(tmp_path / "plan.json")) == found


class TestErrors:
    @pytest.mark.parametrize("given", [{}, {"num_kv_heads": 2, "budget": 8}])
    def test_count(self, model, stats, given):
        with pytest.raises(ValueError, match="one of num_kv_heads and budget"):
            plan(model, stats, **given)

    def test_more_groups_than_heads(self, model, stats):
        with pytest.raises(ValueError, match="7"):
            plan(model, stats, 7)

    @pytest.mark.parametrize("kind", ["loss", "functional"])
    def test_no_held_out_batches(self, model, stats, kind):
        with pytest.raises(ValueError, match="held_out"):
            plan(model, stats, 2, kind=kind)

    def test_published_search_of_losses(self, model, stats):
        with pytest.raises(ValueError, match="method must be 'exact'"):
            plan(model, stats, 2, method="align", held_out=[])

    @pytest.mark.parametrize("text", ["", "[1]", '{"format": "other"}', None])
    def test_file(self, text, tmp_path):
        path = tmp_path / "plan.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json must"):
            Plan.load(path)


class TestPictures:
    def test_are_written(self, tmp_path, model, stats):
        plots = pytest.importorskip("gqa_kernels.reporting.plots")
        pytest.importorskip("matplotlib")
        found = plan(model, stats, 3, **PAIRS)
        D = similarity(model, stats, 0, "k", "functional").array
        pictures = [
            plots.maps(found.maps, tmp_path / "maps.png"),
            plots.curves(found.curves, tmp_path / "curves.png"),
            plots.dendrogram(D, found.layers[0].key.labels, tmp_path / "heads.png"),
            plots.layers({"a": [1.0, 2.0]}, "error", tmp_path / "layers.png"),
            plots.training([3.0, 2.0], [(0, 9.0), (2, 8.0)], tmp_path / "training.png"),
        ]
        from matplotlib.image import imread

        for path in pictures:
            assert np.ptp(imread(path)) > 0  # not blank

    def test_maps_show_each_entry(self, tmp_path):
        plots = pytest.importorskip("gqa_kernels.reporting.plots")
        pytest.importorskip("matplotlib")
        pair = (HeadMap([0, 1, 0, 2]), HeadMap([1, 0, 0, 1]))
        svg = plots.maps([pair], tmp_path / "maps.svg").read_text()
        assert svg.count("<!-- 2 -->") > json.dumps(pair[1].entries).count("2")
