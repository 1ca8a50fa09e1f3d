"""prune_heads(): the function of a model whose dropped heads put nothing into the output."""

import pytest
import torch

from gqa_kernels.convert import convert, load, lowest_heads, prune_heads, save
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models import projections
from gqa_kernels.models.families import attention_layers, layer_weights
from tests.tiny_families import DECODERS, FAMILIES, inputs, output, tiny
from tests.tiny_models import tiny as tiny_model

DROPPED = [[1, 2, 5], [0]]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # as in tests/models/test_families.py
PRUNABLE = [family for family in FAMILIES if family != "t5"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def silenced(model, dropped):
    """The model, with the output weights of some heads set to zero."""
    for layer, heads in zip(attention_layers(model), dropped, strict=True):
        weights = layer_weights(layer)
        o = weights.o.clone()
        o[:, list(heads)] = 0
        projections.write_output(layer.output, o, weights.o_bias)
    return model


@pytest.mark.parametrize("family", PRUNABLE)
def test_dropped_heads_put_nothing_into_the_output(family, tmp_path):
    parent = tiny(family)
    before = output(parent, inputs(family))
    child = prune_heads(parent, DROPPED)
    child.set_attn_implementation("asym_gqa")
    found = output(child, inputs(family))
    torch.testing.assert_close(output(parent, inputs(family)), before)
    torch.testing.assert_close(found, output(silenced(parent, DROPPED), inputs(family)), **CLOSE)
    assert not torch.allclose(found, before, atol=1e-2)
    first, second = attention_layers(child)
    assert (first.num_heads, second.num_heads) == (3, 5)
    assert first.key_map.num_kv_heads == 3
    loaded = load(save(child, tmp_path / "child"))
    assert torch.equal(output(loaded, inputs(family)), found)
    for (name, old), new in zip(child.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(old, new), name


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache(family):
    child = prune_heads(tiny(family), DROPPED)
    child.set_attn_implementation("asym_gqa")
    prompt = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4).long()}
    options = {"max_new_tokens": 5, "do_sample": False}
    cached, plain = (child.generate(**prompt, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] > 4


def test_a_kv_head_stays_while_it_is_read():
    parent = tiny_model(num_kv_heads=2)  # of 6 query heads: 0 to 2 read the first
    one, both = (
        attention_layers(prune_heads(parent, [heads, []]))[0] for heads in ([0, 1, 2], [0, 1])
    )
    assert (list(one.key_map), one.key_map.num_kv_heads) == ([0, 0, 0], 1)
    assert (list(both.key_map), both.key_map.num_kv_heads) == ([0, 1, 1, 1], 2)


def test_pruned_models_convert_and_are_pruned_again():
    child = prune_heads(tiny("llama"), DROPPED)
    merged = convert(child, [[0, 0, 1], [0, 1, 0, 1, 1]])
    assert [layer.heads for layer in attention_layers(merged)] == [(3, 2, 2), (5, 2, 2)]
    merged.set_attn_implementation("asym_gqa")
    assert output(merged, inputs("llama")).isfinite().all()
    again = prune_heads(merged, [[0], [1, 3, 4]])
    assert [layer.heads for layer in attention_layers(again)] == [(2, 2, 2), (2, 1, 1)]


def test_lowest_heads():
    scores = [[0.1, 0.2, 0.3], [0.9, 0.15, 0.8]]
    assert lowest_heads(scores, 0) == [[], []]
    assert lowest_heads(scores, 2) == [[0], [1]]
    assert lowest_heads(scores, 3) == [[0, 1], [1]]
    assert lowest_heads(scores, 4) == [[0, 1], [1, 2]]  # one stays in each layer
    with pytest.raises(ValueError, match=r"count must lie in \[0, 4\].*got 5"):
        lowest_heads(scores, 5)


@pytest.mark.parametrize(
    "dropped, words",
    [
        ([[]], r"dropped must have one entry per layer \(2\), got 1"),
        ([[], [6]], r"dropped\[1\] must name heads from 0 to 5, got 6"),
        ([range(6), []], r"dropped\[0\] must leave at least one of 6 heads"),
    ],
)
def test_what_is_refused(dropped, words):
    with pytest.raises(ValueError, match=words):
        prune_heads(tiny("llama"), dropped)


@pytest.mark.parametrize("make", [lambda: tiny("t5"), lambda: tiny_model("gpt_oss")])
def test_parameters_by_head_are_refused(make):
    model = make()
    with pytest.raises(NotImplementedError, match="by head to drop heads"):
        prune_heads(model, [[0]] * len(attention_layers(model)))
