"""layer_errors() and select_maps(): against errors taken from the modules by hand."""

import copy

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, select_maps
from gqa_kernels.grouping import calibrate, layer_errors
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers
from tests import tiny_families
from tests.tiny_models import batch, tiny

register()
OWN, ONE, PAIRS = HeadMap(range(6)), HeadMap([0] * 6), HeadMap.uniform(6, 3)
GIVEN = batch([9, 5], "right")


def outputs(model, given):
    """``[n, d]`` of each layer's output projection, without padding."""
    found = []
    hooks = [
        layer.output.register_forward_hook(lambda _, __, out: found.append(out))
        for layer in attention_layers(model)
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    mask = given.get("attention_mask")
    return [out.flatten(0, 1) if mask is None else out[mask.bool()] for out in found]


@pytest.mark.parametrize("family", [f for f in tiny_families.FAMILIES if f != "t5"])
def test_first_layer_against_a_run_of_the_child(family):
    """The first layer has the same inputs in both models."""
    parent, given = tiny_families.tiny(family), tiny_families.inputs(family)
    maps = tiny_families.maps_for(parent)
    child = convert(parent, maps, "mean")
    child.set_attn_implementation("asym_gqa")
    ours, theirs = outputs(child, given)[0].double(), outputs(parent, given)[0].double()
    expected = (ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()
    found = layer_errors(parent, child, [given])
    assert len(found) == 2
    assert found[0] == pytest.approx(float(expected), rel=1e-4)
    assert found[1] > 0.01


def test_later_layers_are_judged_on_the_parents_inputs():
    parent = tiny(num_kv_heads=6)
    child = convert(parent, [ONE, OWN])
    child.set_attn_implementation("asym_gqa")
    first, second = layer_errors(parent, child, [GIVEN])
    assert first > 0.1 and second < 1e-10


def test_batches_and_padding_make_no_difference():
    parent = tiny(num_kv_heads=6)
    child = convert(parent, [PAIRS] * 2)
    child.set_attn_implementation("asym_gqa")
    other = {**GIVEN, "input_ids": GIVEN["input_ids"] + 7 * (1 - GIVEN["attention_mask"])}
    rows = [{name: tensor[i : i + 1] for name, tensor in GIVEN.items()} for i in range(2)]
    whole = layer_errors(parent, child, [GIVEN])
    assert layer_errors(parent, child, [other]) == pytest.approx(whole)
    assert layer_errors(parent, child, rows) == pytest.approx(whole, rel=1e-4)


def test_a_constant_output_has_error_one():
    parent = tiny(num_kv_heads=6)
    mean = outputs(parent, GIVEN)[0].mean(0)
    child = copy.deepcopy(parent)
    child.model.layers[0].self_attn.o_proj = torch.nn.Linear(96, 96)
    with torch.no_grad():
        child.model.layers[0].self_attn.o_proj.weight.zero_()
        child.model.layers[0].self_attn.o_proj.bias.copy_(mean)
    assert layer_errors(parent, child, [GIVEN])[0] == pytest.approx(1, rel=1e-4)


def test_models_are_left_as_they_were():
    parent = tiny(num_kv_heads=6).train()
    layer_errors(parent, convert(parent, [OWN] * 2), [GIVEN])
    assert parent.training
    for layer in attention_layers(parent):
        assert not layer.module._forward_pre_hooks and not layer.output._forward_hooks


class TestErrors:
    def test_not_a_number(self):
        parent = tiny(num_kv_heads=6)
        child = copy.deepcopy(parent)
        with torch.no_grad():
            child.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="must be finite, got NaN or inf in layer 1"):
            layer_errors(parent, child, [GIVEN])

    def test_nothing_to_measure_on(self):
        with pytest.raises(ValueError, match="at least one token"):
            layer_errors(tiny(), tiny(), [])

    def test_no_candidates(self):
        with pytest.raises(ValueError, match="must not be empty"):
            select_maps(tiny(), {}, [GIVEN])


class TestSelection:
    def test_takes_the_best_of_each_layer(self):
        parent = tiny(num_kv_heads=6)
        stats = calibrate(parent, [batch([12, 10], "right", seed=4)])
        candidates = {
            "good, bad": [(OWN, PAIRS), (ONE, ONE)],
            "bad, good": [(ONE, ONE), (PAIRS, OWN)],
        }
        found = select_maps(parent, candidates, [GIVEN], moments=stats)
        assert found.names == ("good, bad", "bad, good")
        assert found.maps == ((OWN, PAIRS), (PAIRS, OWN))
        for layer in range(2):
            assert found.errors[layer] == min(errors[layer] for errors in found.tried.values())
        child = convert(parent, found.maps, "aligned", moments=stats,
                        restore_norms=found.restore_norms)  # fmt: skip
        child.set_attn_implementation("asym_gqa")
        assert layer_errors(parent, child, [GIVEN]) == pytest.approx(list(found.errors))

    def test_norms_are_restored_only_where_that_helps(self):
        parent = tiny(num_kv_heads=6)
        found = select_maps(parent, {"one": [(PAIRS, PAIRS)] * 2}, [GIVEN], "mean")
        for layer, restored in enumerate(found.restore_norms):
            errors = {r: found.tried["one", r][layer] for r in (False, True)}
            assert errors[restored] == min(errors.values())
            assert errors[True] != errors[False]
