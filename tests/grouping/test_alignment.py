"""Alignment: turned copies come back together, and turning changes nothing."""

import copy

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert.model import set_maps, write_layer
from gqa_kernels.grouping import align_layer, calibrate, merge_layer
from gqa_kernels.grouping.alignment import rotations
from gqa_kernels.grouping.space import HeadSpace
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers, attention_modules, family_of
from tests import tiny_families
from tests.grouping.layers import ROTARY, attention, layer, moments, relative, tokens

X = tokens()
KEY_MAP, VALUE_MAP = HeadMap([0, 0, 1, 1, 2, 0]), HeadMap([0, 1, 1, 0, 0, 0])


def turned_copies(weights, side, seed=5):
    """The layer with all heads of a side turned copies of head 0, in ways that are allowed."""
    space = HeadSpace.of(weights, side)
    noise = torch.randn(
        len(space.rows), *space.cross.shape[2:], dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    R = space.symmetry.nearest(noise)
    rows = R @ weights.rows(side)[0]
    return weights.with_rows(side, rows, space.head_map)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("by_moments", [False, True])
def test_turned_copies_merge_without_loss(rotary, side, by_moments):
    weights = turned_copies(layer(rotary), side)
    maps = {"k": HeadMap([0] * 6) if side == "k" else weights.key_map}
    maps["v"] = HeadMap([0] * 6) if side == "v" else weights.value_map
    given = moments(X) if by_moments else None
    for method in ("aligned", "low_rank"):
        child = merge_layer(weights, maps["k"], maps["v"], method=method, moments=given)
        assert relative(attention(child, X), attention(weights, X)) < 1e-6
    plain = merge_layer(weights, maps["k"], maps["v"], method="mean")
    assert relative(attention(plain, X), attention(weights, X)) > 0.05


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("rotary", ROTARY)
def test_alignment_alone_changes_nothing(rotary, num_kv_heads, norm):
    weights = layer(rotary, num_kv_heads=num_kv_heads, norm=norm)
    child = align_layer(weights, KEY_MAP, VALUE_MAP, moments=moments(X))
    assert relative(attention(child, X), attention(weights, X)) < 1e-10
    assert not torch.equal(child.o, weights.o)


def test_aligned_merging_is_the_mean_of_aligned_heads():
    weights = layer("half_split", num_kv_heads=2)
    child = merge_layer(weights, KEY_MAP, VALUE_MAP, method="aligned", moments=moments(X))
    turned = align_layer(weights, KEY_MAP, VALUE_MAP, moments=moments(X))
    again = merge_layer(turned, KEY_MAP, VALUE_MAP, method="mean")
    torch.testing.assert_close(again.k, child.k)
    torch.testing.assert_close(again.v, child.v)
    assert relative(attention(again, X), attention(child, X)) < 1e-6


@pytest.mark.parametrize("rotary", ["none", "half_split"])
def test_rotations_beat_turning_everything_onto_one_head(rotary):
    space = HeadSpace.of(layer(rotary), "k", moments(X))
    heads, shares = list(range(6)), torch.tensor([1.0, 2, 1, 1, 3, 1], dtype=torch.float64)

    def together(R):
        turned = torch.einsum("iab,ijbc,jdc->ijad", R, space.cross, R)
        return torch.einsum("i,j,ijaa->", shares, shares, turned)

    found = together(rotations(space, heads, shares))
    for centre in heads:
        assert found > 1.01 * together(space.symmetry.nearest(space.cross[centre]))


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_models_compute_the_same_after_alignment(family):
    """fp32, relative to the output: at most 1e-5."""
    register()
    parent, given = tiny_families.tiny(family), tiny_families.inputs(family)
    stats = calibrate(parent, [given])
    child = copy.deepcopy(parent)
    kind = family_of(child)
    pairs = []
    modules = list(attention_modules(child, kind))
    for old, (_, module, output), maps in zip(
        attention_layers(parent), modules, tiny_families.maps_for(parent), strict=True
    ):
        layer_stats = stats[old.index]
        turned = align_layer(
            tiny_families.layer_weights(old), *maps, moments=layer_stats,
            query_moments=layer_stats.query,
        )  # fmt: skip
        write_layer(module, output, kind, turned)
        pairs.append((turned.key_map, turned.value_map))
    set_maps(child, kind, pairs)
    child.set_attn_implementation("eager" if family == "t5" else "asym_gqa")
    if family == "t5":
        child = tiny_families.stock(child, parent)
    ours, theirs = (tiny_families.output(model, given) for model in (child, parent))
    assert relative(ours, theirs) < 1e-5
