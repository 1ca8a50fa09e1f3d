"""search, convert, eval and inspect: artefacts on a tiny model, and refusals."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gqa_kernels import cli
from gqa_kernels.commands import data
from gqa_kernels.convert import load, save
from gqa_kernels.convert.plan import Plan
from gqa_kernels.models.families import attention_layers
from tests import tiny_families
from tests.test_demo import ByteTokenizer
from tests.tiny_models import tiny

SHAPE = ("--shape", "6", "24")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent, what search wrote, and a converted child."""
    root = tmp_path_factory.mktemp("commands")
    save(tiny(num_heads=6, num_kv_heads=6, vocab_size=128), root / "parent")
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: SavedTokenizer())
    search = ("search", root / "parent", "--kv-heads", 3, "--sizes", "auto", "--check")
    assert main(*search, "--out", root / "search", *SHAPE) == 0
    convert = ("convert", root / "parent", root / "search", root / "child", "--steps", 2)
    assert main(*convert, *SHAPE) == 0
    yield root
    patch.undo()


class SavedTokenizer(ByteTokenizer):
    def save_pretrained(self, folder):
        (folder / "tokenizer.txt").write_text("bytes")


def main(*arguments):
    return cli.main(list(map(str, arguments)))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_search(folders):
    found = Plan.load(folders / "search" / "plan.json")
    assert [m.num_kv_heads for pair in found.maps for m in pair] == [3] * 4
    assert all(layer.error > 0 for layer in found.layers)
    expected = {"plan.json", "moments.safetensors", "maps.png", "curves.png", "heads.png"}
    assert names(folders / "search") == expected


def test_convert(folders):
    plan = Plan.load(folders / "search" / "plan.json")
    child = load(folders / "child")
    maps = [(layer.key_map, layer.value_map) for layer in attention_layers(child)]
    assert maps == plan.maps
    history = json.loads((folders / "child" / "recovery.json").read_text())
    assert len(history["loss"]) == 2
    assert {"maps.png", "recovery.png", "tokenizer.txt"} <= names(folders / "child")


def test_eval(folders, tmp_path, capsys):
    out = tmp_path / "eval"
    assert main("eval", folders / "parent", folders / "child", "--out", out, *SHAPE) == 0
    found = json.loads((out / "eval.json").read_text())
    assert found["tokens"] == 6 * 23
    assert f"perplexity {found['perplexity']:.6g}" in capsys.readouterr().out
    assert names(out) == {"eval.json", "errors.png", "entropy.png"}


def test_inspect(folders, tmp_path, capsys):
    assert main("inspect", folders / "child", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    maps = Plan.load(folders / "search" / "plan.json").maps
    for index, (key, value) in enumerate(maps):
        line = f"layer {index}: 6 query heads; K 3 heads {list(key)}, V 3 heads {list(value)}"
        assert line in text
    assert "KV cache: 768 bytes per token, 50.0% of a head per query head" in text
    saved = json.loads((tmp_path / "maps.json").read_text())
    assert saved == [{"k": list(k), "v": list(v)} for k, v in maps]


def test_images_by_batches(tmp_path):
    save(tiny_families.tiny("vit"), tmp_path / "vit")
    save_file(tiny_families.inputs("vit"), tmp_path / "images.safetensors")
    options = ("--batches", tmp_path / "images.safetensors")
    search = ("search", tmp_path / "vit", "--budget", 10, "--out", tmp_path / "search", *options)
    assert main(*search) == 0
    assert main("convert", tmp_path / "vit", tmp_path / "search", tmp_path / "child") == 0
    heads = [layer.heads for layer in attention_layers(load(tmp_path / "child"))]
    assert sum(each.key + each.value for each in heads) <= 10
    evaluate = ("eval", tmp_path / "vit", tmp_path / "child", "--out", tmp_path / "eval", *options)
    assert main(*evaluate) == 0
    assert 0 < json.loads((tmp_path / "eval" / "eval.json").read_text())["state_cosine"] < 1


def test_without_matplotlib_results_stay(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.reporting.plots._figure", missing)
    assert main("inspect", folders / "child", "--out", tmp_path) == 0
    assert names(tmp_path) == {"maps.json"}
    assert "no picture: pictures need matplotlib" in capsys.readouterr().err


def missing(*_):
    raise ImportError("pictures need matplotlib: pip install 'gqa-kernels[plots]'")


class TestRefusals:
    def refused(self, capsys, *arguments):
        assert main(*arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after transformers' bars
        assert error.startswith("gqa-kernels: ")
        return error

    def test_model_that_is_not_there(self, tmp_path, capsys):
        error = self.refused(capsys, "inspect", tmp_path / "nowhere")
        assert "must be a checkpoint" in error

    def test_truncated_checkpoint(self, folders, tmp_path, capsys):
        folder = save(load(folders / "child"), tmp_path / "child")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert "must be a complete checkpoint" in self.refused(capsys, "inspect", folder)

    def test_more_groups_than_heads(self, folders, tmp_path, capsys):
        search = ("search", folders / "parent", "--kv-heads", 7, "--out", tmp_path, *SHAPE)
        assert "7" in self.refused(capsys, *search)
        assert "plan.json" not in names(tmp_path)

    def test_activations_with_nan(self, folders, tmp_path, capsys):
        model = load(folders / "parent")
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(torch.nan)
        save(model, tmp_path / "broken")
        search = ("search", tmp_path / "broken", "--kv-heads", 2, "--out", tmp_path / "s", *SHAPE)
        assert "activations must be finite" in self.refused(capsys, *search)
        assert not (tmp_path / "s").exists()

    def test_plan_of_another_model(self, folders, tmp_path, capsys):
        save(tiny(num_hidden_layers=3), tmp_path / "other")
        convert = ("convert", tmp_path / "other", folders / "search", tmp_path / "out")
        assert "one entry per layer (3), got 2" in self.refused(capsys, *convert)
        assert not (tmp_path / "out").exists()

    def test_folder_that_is_taken(self, folders, capsys):
        convert = ("convert", folders / "parent", folders / "search", folders / "child")
        assert "must not exist or be empty" in self.refused(capsys, *convert)

    def test_unknown_family(self, tmp_path, capsys):
        save(tiny("gemma", hidden_activation="gelu"), tmp_path / "gemma")
        error = self.refused(capsys, "inspect", tmp_path / "gemma")
        assert "must be one of llama, " in error and "got 'gemma'" in error

    def test_model_without_a_tokenizer(self, folders, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(data, "load_model", lambda name: data.Loaded(load(name), None))
        monkeypatch.setattr("gqa_kernels.commands.search.load_model", data.load_model)
        search = ("search", folders / "parent", "--kv-heads", 2, "--out", tmp_path, *SHAPE)
        assert "--batches must be given" in self.refused(capsys, *search)

    def test_rows_that_differ(self, folders, tmp_path, capsys):
        path = tmp_path / "batches.safetensors"
        save_file({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(3, 4)}, path)
        search = ("search", folders / "parent", "--kv-heads", 2, "--out", tmp_path)
        assert "equally many rows, got [2, 3]" in self.refused(capsys, *search, "--batches", path)
