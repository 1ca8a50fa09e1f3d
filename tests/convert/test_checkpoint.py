"""save() and load(): round trips, and what is refused."""

import copy
import json
import os
import stat

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, load, save
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers
from tests.tiny_families import FAMILIES, HEADS, inputs, maps_for, output, tiny

UNEVEN = HeadMap([0, 0, 0, 1, 2, 1])  # 6 heads over 3: counts divide, groups don't


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def child_of(family, maps=None):
    parent = tiny(family)
    child = convert(parent, maps or maps_for(parent))
    child.set_attn_implementation("asym_gqa")
    return child


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    child = child_of(family)
    loaded = load(save(child, tmp_path / "child"))
    assert type(loaded).__name__ == type(child).__name__
    assert not loaded.training
    assert loaded.config._attn_implementation == "asym_gqa"
    for ours, theirs in zip(attention_layers(loaded), attention_layers(child), strict=True):
        assert (ours.key_map, ours.value_map) == (theirs.key_map, theirs.value_map)
        assert ours.heads == theirs.heads
    given = inputs(family)
    assert torch.equal(output(loaded, given), output(child, given))
    again = load(save(loaded, tmp_path / "again"))
    assert torch.equal(output(again, given), output(child, given))


def test_loaded_model_can_be_converted_further(tmp_path):
    loaded = load(save(child_of("gpt2"), tmp_path / "child"))
    wide = convert(loaded, [HeadMap.uniform(HEADS, HEADS)] * 2, merging="none")
    given = inputs("gpt2")
    torch.testing.assert_close(output(wide, given), output(loaded, given), rtol=1e-4, atol=1e-4)


def test_ordinary_checkpoints_load_too(tmp_path):
    model = tiny("llama")
    loaded = load(save(model, tmp_path / "plain"))
    assert torch.equal(output(loaded, inputs("llama")), output(model, inputs("llama")))
    assert "attn_implementation" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_dtype_is_passed_on(tmp_path):
    loaded = load(save(child_of("llama"), tmp_path / "child"), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16


def test_stock_loading_of_uneven_groups_that_divide_asks_for_asym_gqa(tmp_path):
    """transformers would compute equal groups: the config makes it ask for our attention."""
    child = child_of("llama", [UNEVEN] * 2)
    child.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "asym_gqa"
    assert torch.equal(output(loaded, inputs("llama")), output(child, inputs("llama")))
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("attn_implementation", "_attn_implementation"):  # of transformers 5, and 4
        config[field] = "asym_gqa_is_not_registered_here"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in ({}, {"attn_implementation": "sdpa"}):  # also whoever asks for another one
        with pytest.raises(ValueError, match="is not supported"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="is not supported"):
        pipeline("text-generation", model=str(tmp_path))


def test_engines_find_no_stock_class_for_an_uneven_child(tmp_path):
    """They would compute equal groups: vLLM and SGLang go by ``architectures``."""

    def saved(model, name, by=save):
        by(model, tmp_path / name)
        return json.loads((tmp_path / name / "config.json").read_text())["architectures"]

    def by_transformers(model, folder):
        stock = type(model)
        model.save_pretrained(folder)
        assert type(model) is stock

    ours = ["AsymGQALlamaForCausalLM"]
    child = child_of("llama", [UNEVEN] * 2)
    assert saved(child, "uneven") == ours
    assert saved(child_of("llama", [HeadMap.uniform(HEADS, 3)] * 2), "even") == [ours[0][7:]]
    assert saved(load(tmp_path / "uneven"), "again") == ours
    assert saved(copy.deepcopy(child), "by transformers", by_transformers) == ours
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "by transformers")
    assert saved(loaded, "loaded by transformers", by_transformers) == ours
    assert saved(loaded.base_model, "body", by_transformers) == ["AsymGQALlamaModel"]
    # FSDP puts a class of its own around the model's.
    loaded.__class__ = type("FSDPLlamaForCausalLM", (type(loaded),), {})
    assert saved(loaded, "sharded", by_transformers) == ours


def test_another_of_our_implementations_can_be_named(tmp_path):
    child = child_of("llama", [UNEVEN] * 2)
    name = register("asym_gqa_for_a_test", backend="reference")
    loaded = load(save(child, tmp_path / "child"), attn_implementation=name)
    assert loaded.config._attn_implementation == name


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_loaded_child_refuses_equal_groups(tmp_path, implementation, padded):
    """Also without a mask, where SDPA and flex attention group heads by their counts alone."""
    child_of("llama", [UNEVEN] * 2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.set_attn_implementation(implementation)
    given = inputs("llama") if padded else {"input_ids": inputs("llama")["input_ids"][:, :1]}
    with pytest.raises(NotImplementedError, match="would compute equal groups"), torch.no_grad():
        loaded(**given)


def test_stock_loading_of_counts_that_differ_fails(tmp_path):
    child_of("vit").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched|ignore_mismatched"):
        AutoModel.from_pretrained(tmp_path)


def test_even_child_is_an_ordinary_checkpoint(tmp_path):
    child = child_of("llama", [HeadMap.uniform(HEADS, 3)] * 2)
    child.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    given = inputs("llama")
    torch.testing.assert_close(output(loaded, given), output(child, given), rtol=1e-4, atol=1e-4)


class TestSaving:
    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "mine.txt").write_text("keep me")
        with pytest.raises(ValueError, match="must not exist or be empty"):
            save(tiny("llama"), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_an_empty_folder_will_do(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert load(save(tiny("llama"), tmp_path / "empty"))

    def test_failure_half_way_leaves_nothing(self, tmp_path):
        class Broken:
            def save_pretrained(self, folder):
                (folder / "vocabulary.txt").write_text("half")
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            save(tiny("llama"), tmp_path / "child", processor=Broken())
        assert not list(tmp_path.iterdir())


def test_others_may_read_a_child(tmp_path):
    """safetensors writes files for their owner only; the umask decides."""
    before = os.umask(0o022)
    try:
        folder = save(tiny("llama"), tmp_path / "child")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


class TestLoading:
    def saved(self, tmp_path, family="llama"):
        return save(child_of(family), tmp_path / "child")

    def edit(self, folder, **fields):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match=r"with a config\.json"):
            load(tmp_path / "nowhere")

    @pytest.mark.parametrize("kept", [0.9, 0.01])
    def test_truncated_weights(self, tmp_path, kept):
        weights = self.saved(tmp_path) / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: int(kept * len(data))])
        with pytest.raises(ValueError, match="must be a complete checkpoint"):
            load(weights.parent)

    def test_no_weights(self, tmp_path):
        folder = self.saved(tmp_path)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="must be a complete checkpoint"):
            load(folder)

    def test_weight_missing(self, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = self.saved(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 missing keys, .*layers\.1\.self_attn\.k_proj"):
            load(folder)

    def test_maps_of_other_shapes(self, tmp_path):
        folder = self.saved(tmp_path)
        self.edit(folder, kv_head_map=[list(UNEVEN)] * 2, value_head_map=None)
        with pytest.raises(ValueError, match="mismatched keys"):
            load(folder)

    def test_too_few_maps(self, tmp_path):
        folder = self.saved(tmp_path)
        self.edit(folder, kv_head_map=[list(UNEVEN)], value_head_map=None)
        with pytest.raises(ValueError, match=r"one entry per layer \(2\), got 1"):
            load(folder)

    def test_too_few_value_maps(self, tmp_path):
        folder = self.saved(tmp_path)
        self.edit(folder, value_head_map=[list(UNEVEN)])
        with pytest.raises(ValueError, match="for each of 2 layers, got 1"):
            load(folder)

    def test_value_maps_alone(self, tmp_path):
        folder = self.saved(tmp_path)
        self.edit(folder, kv_head_map=None)
        with pytest.raises(ValueError, match="must come with kv_head_map"):
            load(folder)

    def test_unknown_family(self, tmp_path):
        folder = self.saved(tmp_path)
        self.edit(folder, model_type="cohere", architectures=["CohereForCausalLM"])
        with pytest.raises(NotImplementedError, match="'cohere' model with head maps"):
            load(folder)

    @pytest.mark.parametrize("pickled", [b"", b"cos\nsystem\n(S'true'\ntR.", "tensor"])
    def test_pickled_weights(self, tmp_path, pickled):
        folder = self.saved(tmp_path)
        (folder / "model.safetensors").unlink()
        target = folder / "pytorch_model.bin"
        if pickled == "tensor":
            torch.save(torch.ones(3), target)
        else:
            target.write_bytes(pickled)
        with pytest.raises(ValueError, match="must be a complete checkpoint"):
            load(folder)

    @pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
    def test_index_that_leads_out(self, tmp_path, weights):
        folder = self.saved(tmp_path)
        (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
        content = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
        (folder / f"{weights}.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="must name files in its own folder"):
            load(folder)

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_attention_heads": 0},
            {"num_attention_heads": -6},
            {"num_attention_heads": "six"},
            {"hidden_size": None},
            {"num_hidden_layers": -1},
            {"rope_scaling": 3},
            {"kv_head_map": True},
            {"architectures": "LlamaForCausalLM"},
            {"architectures": ["LlamaConfig"]},
            {"architectures": [3]},
            {"model_type": ["llama"]},
        ],
    )
    def test_hostile_config(self, tmp_path, fields):
        folder = self.saved(tmp_path)
        self.edit(folder, **fields)
        with pytest.raises((ValueError, TypeError)):
            load(folder)

    @pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
    def test_config_that_is_none(self, tmp_path, text):
        folder = self.saved(tmp_path)
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="must be a complete checkpoint"):
            load(folder)

    def test_unknown_architecture(self, tmp_path):
        folder = self.saved(tmp_path)
        self.edit(folder, architectures=["AbacusForCausalLM"])
        with pytest.raises(ValueError, match="must name a model class"):
            load(folder)
