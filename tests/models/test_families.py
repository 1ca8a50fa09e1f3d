"""Every family: converted models against the same function in transformers' own modules."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, load, save
from gqa_kernels.convert.attention import Forward
from gqa_kernels.grouping import calibrate
from gqa_kernels.integrations.transformers import register
from gqa_kernels.integrations.transformers.versions import installed
from gqa_kernels.models import families
from gqa_kernels.models.families import attention_layers, layer_weights
from tests.integrations.releases import CACHE
from tests.tiny_families import (
    DECODERS,
    FAMILIES,
    GROUPED,
    HEADS,
    LLAMA_LIKE,
    inputs,
    maps_for,
    output,
    stock,
    tiny,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # two fp32 summation orders, values up to about 5


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def converted(family):
    """A parent and its child with other K and V counts in every layer."""
    parent = tiny(family)
    if family in GROUPED:  # 3 KV heads: K's and V's maps merge those, with multiplicity
        assert attention_layers(parent)[0].key_map == HeadMap.uniform(HEADS, 3)
    child = convert(parent, maps_for(parent))
    child.set_attn_implementation("asym_gqa")
    return parent, child


def expanded(parent, child):
    """The child in stock modules; a GQA parent's are widened to a KV head per query head."""
    if parent.config.model_type in GROUPED:
        parent = convert(parent, [HeadMap.uniform(HEADS, HEADS)] * 2, merging="none")
    return stock(child, parent)


def test_child_computes_what_expanded_keys_and_values_give(family):
    parent, child = converted(family)
    given = inputs(family)
    ours = output(child, given)
    torch.testing.assert_close(ours, output(expanded(parent, child), given), **CLOSE)
    assert not torch.allclose(ours, output(parent, given), atol=1e-2)  # and it is another function


@pytest.mark.skipif(installed() < (5, 0), reason="transformers 4 lacks some of them")
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_families_with_llamas_attention(family, tmp_path):
    """Converted, saved, loaded and generating with a cache, each equals expanded K and V."""
    parent, child = converted(family)
    reference, given = expanded(parent, child), inputs(family)
    child = load(save(child, tmp_path / "child"))
    torch.testing.assert_close(output(child, given), output(reference, given), **CLOSE)
    assert not torch.allclose(output(child, given), output(parent, given), atol=1e-2)
    ids = given["input_ids"][:1, :5]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(child.generate(ids, **options), reference.generate(ids, **options))
    # Aligned heads are the parent's function as long as none are merged.
    maps = [HeadMap.uniform(HEADS, 3)] * 2
    aligned = convert(parent, maps, "aligned", moments=calibrate(parent, [given]))
    aligned.set_attn_implementation("asym_gqa")
    torch.testing.assert_close(output(aligned, given), output(parent, given), **CLOSE)


def test_clipped_projections_are_refused():
    parent = tiny("olmo")
    parent.config.clip_qkv = 8.0
    with pytest.raises(NotImplementedError, match="must not clip q, k and v"):
        attention_layers(parent)


def test_every_family_is_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs/tutorials/compress.md").read_text()
    (named,) = re.findall(r"Model families: (.*?)\.\n", page, re.DOTALL)
    known = [model_type for family in families.FAMILIES for model_type in family.model_types]
    assert sorted(re.findall(r"`(\w+)`", named)) == sorted(known)


def test_lossless_child_computes_what_its_parent_does(family):
    parent = tiny(family)
    layers = attention_layers(parent)
    maps = [HeadMap([5, 2, 0, 1, 3, 4])] * len(layers)  # a permutation of the KV heads
    child = convert(parent, maps, merging="none")
    child.set_attn_implementation("asym_gqa")
    given = inputs(family)
    torch.testing.assert_close(output(child, given), output(parent, given), **CLOSE)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache(family):
    parent, child = converted(family)
    given = {**inputs(family), "max_new_tokens": 8, "do_sample": False}
    given["input_ids"], given["attention_mask"] = (
        given[name].flip(1) for name in ("input_ids", "attention_mask")
    )
    ours, theirs = (model.generate(**given) for model in (child, expanded(parent, child)))
    assert ours.tolist() == theirs.tolist()
    cache = getattr(child(given["input_ids"], use_cache=True), CACHE)
    for layer, held in zip(attention_layers(child), cache.layers, strict=True):
        assert held.keys.shape[1] == layer.key_map.num_kv_heads
        assert held.values.shape[1] == layer.value_map.num_kv_heads


def test_generation_of_an_encoder_decoder():
    parent, child = converted("t5")
    given = {k: v for k, v in inputs("t5").items() if k != "decoder_input_ids"}
    given.update(max_new_tokens=8, do_sample=False)
    ours, theirs = (model.generate(**given) for model in (child, stock(child, parent)))
    assert ours.tolist() == theirs.tolist()


def test_norms_and_rotations_of_gemma3():
    """Its norms store their weights minus 1, and each type of layer has a rotation of its own."""
    model = tiny("gemma3_text")
    for layer, kind in zip(attention_layers(model), model.config.layer_types, strict=True):
        weights, x = layer_weights(layer), torch.randn(3, 8)
        by_hand = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + weights.norm_eps)
        torch.testing.assert_close(layer.module.q_norm(x), by_hand * weights.q_norm)
        torch.testing.assert_close(layer.module.k_norm(x), by_hand * weights.k_norm)
        base = model.config.rope_parameters[kind]["rope_theta"]
        expected = [base ** (-2 * plane / 8) for plane in range(4)]
        assert layer.rotary.frequencies == pytest.approx(expected)
    assert len({p["rope_theta"] for p in model.config.rope_parameters.values()}) == 2


def test_weights_by_head_give_the_attention_inputs_projections(family):
    """Recorded outputs of the model's own projections against ``layer_weights`` applied by hand."""
    model = tiny(family)
    layer = attention_layers(model)[0]
    seen = {}
    layer.key.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    output(model, inputs(family))
    weights = layer_weights(layer)
    sides = {"q": HEADS, "k": weights.k.shape[0], "v": weights.v.shape[0]}
    by_hand = {}
    for side in sides:
        rows = getattr(weights, side)
        by_hand[side] = torch.einsum("hed,bsd->bshe", rows, seen["x"])
        if getattr(weights, f"{side}_bias") is not None:
            by_hand[side] += getattr(weights, f"{side}_bias")
    if family == "gpt2":
        expected = torch.cat([by_hand[s].flatten(2) for s in "qkv"], -1)
    elif family == "gpt_neox":
        expected = torch.stack([by_hand[s] for s in "qkv"], 3).flatten(2)
    else:
        expected = by_hand["k"].flatten(2)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


def test_rotary_is_read_from_the_model():
    expected = {"gpt_neox": 4, "llama": 8}  # half of GPT-NeoX's 8 dims turn
    for family in {"gpt_neox", "llama", "bert"} & set(FAMILIES):
        rotary = attention_layers(tiny(family))[0].rotary
        assert (rotary and rotary.dim) == expected.get(family)


def test_converting_a_child_again_follows_its_maps(family):
    parent, child = converted(family)
    layers = attention_layers(parent)
    full = [HeadMap.uniform(HEADS, HEADS)] * len(layers)
    wide = convert(child, full, merging="none")
    wide.set_attn_implementation("asym_gqa")
    given = inputs(family)
    torch.testing.assert_close(output(wide, given), output(child, given), **CLOSE)


def test_parent_is_untouched(family):
    parent = tiny(family)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    classes = [type(layer.module) for layer in attention_layers(parent)]
    child = convert(parent, maps_for(parent))
    with torch.no_grad():
        for tensor in child.parameters():
            tensor.zero_()
    for name, tensor in parent.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [type(layer.module) for layer in attention_layers(parent)] == classes
    assert getattr(parent.config, "kv_head_map", None) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_attention_fails_on_uneven_groups_that_divide(family, implementation):
    """It would compute the even groups instead."""
    parent = tiny(family)
    if implementation == "sdpa" and not parent._supports_sdpa:
        pytest.skip(f"transformers runs {family} in eager only")
    maps = [HeadMap([0, 0, 0, 1, 2, 1])] * len(attention_layers(parent))
    child = convert(parent, maps)
    child.set_attn_implementation(implementation)
    with pytest.raises(NotImplementedError, match="would compute equal groups"):
        output(child, inputs(family))
    if "input_ids" in inputs(family):  # nor without a mask, where SDPA goes by counts alone
        with pytest.raises(NotImplementedError, match="would compute equal groups"):
            output(child, {n: x for n, x in inputs(family).items() if n != "attention_mask"})


class TestForward:
    """Arguments of a forward that replaces transformers': names change from release to release."""

    class Replaced(torch.nn.Module):
        def forward(self, states, store=None, mask=None, use_cache=False, extra=None, **options):
            raise AssertionError("replaced")

    def test_the_cache_has_any_name(self):
        takes = Forward(self.Replaced, "states", "mask")
        cache = DynamicCache()
        for args, options in (
            ((1, cache, 2), {}),
            ((1,), {"store": cache, "mask": 2}),
            ((), {"states": 1, "mask": 2, "a_name_of_tomorrow": cache, "use_cache": True}),
        ):
            assert takes.read(args, options) == ([1, 2], cache, {})
        assert takes.read((1,), {"scale": 3, "store": None}) == ([1, None], None, {"scale": 3})

    def test_a_name_that_is_gone(self):
        with pytest.raises(NotImplementedError, match=r"must take hidden_states, got .*, store"):
            Forward(self.Replaced, "hidden_states")

    def test_an_argument_that_is_not_known(self):
        takes = Forward(self.Replaced, "states", "mask")
        with pytest.raises(NotImplementedError, match="must get no extra, got a float"):
            takes.read((1,), {"extra": 0.5})


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_models_with_cross_attention_are_refused(family):
    config = tiny(family).config
    config.add_cross_attention = config.is_decoder = True
    model = type(tiny(family))(config)
    with pytest.raises(NotImplementedError, match="must have no cross-attention"):
        convert(model, maps_for(tiny(family)))


def test_maps_of_an_encoder_decoder_that_transformers_loaded(tmp_path):
    """Equal shapes load, but the modules don't know which map is theirs."""
    parent = tiny("t5")
    child = convert(parent, [HeadMap([5, 2, 0, 1, 3, 4])] * 6, merging="none")
    child.save_pretrained(tmp_path)
    loaded = type(parent).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be loaded by gqa_kernels\.convert\.load"):
        output(loaded, inputs("t5"))
