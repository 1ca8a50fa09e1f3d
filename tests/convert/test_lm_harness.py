"""run_tasks(): a local task on a converted model, against likelihoods worked out by hand."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

from gqa_kernels import cli
from gqa_kernels.convert import save
from gqa_kernels.convert.lm_harness import run_tasks
from gqa_kernels.integrations.transformers import register
from tests.integrations.stand_ins import stand_in
from tests.tiny_models import split, tiny, write_tokenizer

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (extra lm-eval)"
)

LOCAL = {"include_defaults": False}
WORDS = [f"w{number}" for number in range(61)]
QUESTIONS = [("w1 w2 w3", ["w4", "w5"], 0), ("w9 w8", ["w7", "w6"], 1), ("w4 w4", ["w1", "w2"], 0)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[BOS]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[PAD]", **special)


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"q": q, "choices": c, "gold": g}) for q, c, g in QUESTIONS]
    (tmp_path / "questions.json").write_text("\n".join(lines))
    (tmp_path / "words.yaml").write_text(f"""
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/questions.json"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return tmp_path


@needs_lm_eval
def test_local_task(folder, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    register()
    model = split(tiny(num_kv_heads=2), 4)
    expected = []
    for question, choices, gold in QUESTIONS:
        ids = torch.tensor([tokenizer.encode(question, add_special_tokens=False)])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        answers = [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in choices]
        expected.append(int(logits[answers].argmax()) == gold)
    results = run_tasks(model, tokenizer, ["words"], **LOCAL, include_path=folder)
    assert results["words"]["acc,none"] == pytest.approx(sum(expected) / len(expected))


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # of the harness
def test_a_task_that_lm_eval_generates(tmp_path):
    """By the command, on an uneven child; its tokenizer sizes the task's texts of 4,096 tokens."""
    pytest.importorskip("wonderwords", reason="pip install 'lm-eval[ruler]'")
    register()
    parent = tiny(num_kv_heads=2, max_position_embeddings=8192)
    folders = [save(model, tmp_path / name) for name, model in
               (("parent", parent), ("child", split(parent, 4)))]  # fmt: skip
    for folder in folders:
        write_tokenizer(folder)
    out, text = tmp_path / "report", tmp_path / "text"
    text.write_text(" ".join(WORDS))
    command = ["eval", *map(str, folders), "--out", str(out), "--text", str(text)]
    command += ["--shape", "2", "16"]
    assert cli.main([*command, "--tasks", "ruler_fwe", "--limit", "2"]) == 0
    results = json.loads((out / "tasks.json").read_text())["ruler_fwe"]
    assert results["4096,none"] == 0  # a random model finds none of the words
    assert results["sample_len"] == 2


@needs_lm_eval
def test_unknown_task(folder, tokenizer):
    with pytest.raises(ValueError, match="must be known to lm-eval, got juggling"):
        run_tasks(tiny(), tokenizer, ["juggling"], **LOCAL, include_path=folder)


def test_lm_eval_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs lm-eval >= 0\.4\.13"):
        run_tasks(None, None, ["words"])


def test_lm_eval_too_old(monkeypatch):
    stand_in(monkeypatch, "lm_eval.models.huggingface")
    with pytest.raises(ImportError, match=r"needs lm-eval >= 0\.4\.13 .*cannot import name 'HFLM'"):
        run_tasks(None, None, ["words"])
