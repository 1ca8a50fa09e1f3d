"""The check of an engine on a GPU machine, with stand-ins for the engine and the model."""

import sys

import pytest
import torch

from gqa_kernels.cli import check_engine, main
from gqa_kernels.convert import load
from gqa_kernels.samples import smollm2 as demo
from tests.tiny_models import tiny


class Tokenizer:
    def encode(self, text):
        return [3 + ord(letter) % 60 for letter in text]

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    model = tiny(num_heads=6, num_kv_heads=3)
    monkeypatch.setattr(demo, "load_smollm2", lambda: demo.LoadedModel("tiny", model, Tokenizer()))


def engine(wrong):
    """Greedy continuations of the saved folder, by transformers; one token off if ``wrong``."""

    def generate(folder, converted, prompts, new_tokens):
        model = load(folder, dtype=torch.float32)
        assert (getattr(model.config, "kv_head_map", None) is not None) == converted
        found = [check_engine.greedy(model, ids, new_tokens) for ids in prompts]
        found[1][2] += wrong
        return found

    return generate


@pytest.mark.parametrize("wrong", [0, 1])
def test_says_what_is_equal(monkeypatch, capsys, wrong):
    monkeypatch.setitem(check_engine.ENGINES, "vllm", engine(wrong))
    assert main(["check-engine", "vllm", "--new-tokens", "5"]) == wrong
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(check_engine.PROMPTS)
    assert lines[5].startswith(f"converted: {2 if wrong else 5} of 5 tokens equal after 'Water")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_engine_missing(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["check-engine", name]) == 2
    assert f"needs {name} >= 0." in capsys.readouterr().err
