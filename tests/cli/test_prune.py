"""gqa-kernels prune: the heads that it drops, and what it refuses."""

import json

import pytest
import torch

from gqa_kernels import cli
from gqa_kernels.convert import load, prune_heads, save
from tests.tiny_models import tiny


@pytest.fixture
def parent(tmp_path):
    save(tiny(num_heads=6, num_kv_heads=3, vocab_size=128), tmp_path / "parent")
    return load(tmp_path / "parent")


def prune(folder, out, **options):
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return cli.main(["prune", str(folder / "parent"), str(folder / out), *arguments])


def written(folder, content):
    path = folder / "heads.json"
    path.write_text(json.dumps(content))
    return path


def test_heads(parent, tmp_path, capsys):
    layers = parent.config.num_hidden_layers
    dropped = [[0, 1, 4]] + [[]] * (layers - 1)
    assert prune(tmp_path, "child", heads=written(tmp_path, dropped)) == 0
    assert f"query heads: {6 * layers} before, {6 * layers - 3} after" in capsys.readouterr().out
    child, expected = load(tmp_path / "child"), prune_heads(parent, dropped)
    expected.set_attn_implementation("asym_gqa")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(child(ids).logits, expected(ids).logits)
    assert child.config.kv_head_map[0] == [0, 0, 1]  # heads 2, 3 read head 1 of old, 5 head 2


def test_scores(parent, tmp_path):
    layers = parent.config.num_hidden_layers
    scores = [[6.0, 5, 4, 3, 2, 1]] + [[9] * 6] * (layers - 1)
    assert prune(tmp_path, "child", scores=written(tmp_path, scores), count=4) == 0
    sizes = [len(each) for each in load(tmp_path / "child").config.kv_head_map]
    assert sizes == [2] + [6] * (layers - 1)


@pytest.mark.parametrize(
    "content, options, message",
    [
        ([[1, 2]], {"count": 1}, "--scores must have a number for each query head"),
        ({"a": 1}, {"count": 1}, "must hold a list of numbers for each layer"),
        ([[1] * 6] * 2, {}, "--count must be given with --scores"),
    ],
)
def test_refusals(parent, tmp_path, capsys, content, options, message):
    assert prune(tmp_path, "child", scores=written(tmp_path, content), **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "child").exists()


def test_not_json(parent, tmp_path, capsys):
    (tmp_path / "heads.json").write_text("no")
    assert prune(tmp_path, "child", heads=tmp_path / "heads.json") == 2
    assert "must be JSON" in capsys.readouterr().err
