"""The script that runs transformers' own tests, on a clone of a few lines, and on a real one."""

import json
import os
from pathlib import Path

import pytest

from tests.integrations import transformers_suite as suite

CLONE = os.environ.get("TRANSFORMERS_CLONE")  # of huggingface/transformers
COMMON = os.environ.get("TRANSFORMERS_COMMON")  # test_modeling_common.py of the release installed
TESTS = """
import unittest
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.testing_utils import is_flaky, require_flash_attn, slow

def attend(implementation):
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    model = LlamaModel._from_config(config, attn_implementation=implementation)
    return model(torch.ones(1, 3, dtype=torch.long))

class LlamaModelTest(unittest.TestCase):
    def test_eager_matches_sdpa_inference(self):
        attend("sdpa")
    @slow
    @require_flash_attn
    def test_flash_attn_2_inference_equivalence(self):
        attend("flash_attention_2")
    def test_eager_matches_sdpa_generate(self):
        attend("eager")
    def test_batching_equivalence(self):
        self.skipTest("a reason")
    @is_flaky()
    def test_training(self):
        self.assertEqual(1, 2)
    def test_config(self):
        self.fail("is not about attention")
"""


@pytest.fixture
def clone(tmp_path):
    file = suite._tests_of(tmp_path / "clone", "llama")
    file.parent.mkdir(parents=True)
    for folder in (file.parent, file.parents[1], file.parents[2]):
        (folder / "__init__.py").touch()
    file.write_text(TESTS)
    (tmp_path / "clone/tests/models/bert").mkdir()
    return tmp_path / "clone"


def test_what_is_copied(clone, tmp_path):
    common = tmp_path / "common.py"
    common.write_text("newer = True")
    suite.copied(clone, common, tmp_path / "copy", ["llama"])
    assert (tmp_path / "copy/tests/test_modeling_common.py").read_text() == "newer = True"
    assert [f.name for f in (tmp_path / "copy/tests/models").iterdir() if f.is_dir()] == ["llama"]
    with pytest.raises(ValueError, match=r"must have tests/models/t5/test_modeling_t5\.py"):
        suite.copied(clone, None, tmp_path / "other", ["t5"])


def test_counts():
    tests = {
        "a": {"group": "training", "outcome": "passed", "reason": "", "calls": 2},
        "b": {"group": "training", "outcome": "passed", "reason": "", "calls": 0},
        "c": {"group": "training", "outcome": "failed", "reason": "why", "calls": 1},
        "d": {"group": "training", "outcome": "failed", "reason": "why", "calls": 1},
        "e": {"group": "packed sequences", "outcome": "skipped", "reason": "no", "calls": 0},
    }
    found = suite.row("llama", tests, {"c": {"outcome": "passed"}, "d": {"outcome": "failed"}})
    assert found["groups"] == {
        "packed sequences": {"skipped": 1},
        "training": {"failed": 2, "passed": 1, "passed without attention": 1},
    }
    assert [one["fails with stock SDPA too"] for one in found["failures"]] == [False, True]
    assert found["skips"] == {"no": 1}
    assert found["calls of attention"] == 4


def test_families_that_are_not_run_keep_their_rows(tmp_path):
    path = tmp_path / "found.json"
    for name, calls in (("vit", 1), ("llama", 2), ("vit", 3)):
        suite.save({"transformers": "5", "families": [{"family": name, "calls": calls}]}, path)
    found = json.loads(path.read_text())
    assert [(one["family"], one["calls"]) for one in found["families"]] == [
        ("llama", 2),
        ("vit", 3),
    ]


@pytest.mark.slow  # starts pytest and transformers four times
@pytest.mark.parametrize("attention", ["ours", "stock"])
def test_a_clone_of_a_few_lines(clone, tmp_path, attention):
    suite.copied(clone, None, tmp_path / "copy", ["llama"])
    file = str(suite._tests_of(tmp_path / "copy", "llama"))
    _, tests = suite.run(tmp_path / "copy", [file], attention, "reference")
    found = {name.rsplit("::", 1)[1]: (one["outcome"], one["calls"]) for name, one in tests.items()}
    assert found == {
        "test_eager_matches_sdpa_inference": ("passed", 2),
        "test_flash_attn_2_inference_equivalence": ("passed", 2),
        "test_eager_matches_sdpa_generate": ("passed", 0),
        "test_batching_equivalence": ("skipped", 0),
        "test_training": ("failed", 0),
    }
    assert {one["reason"] for one in tests.values()} >= {"a reason", "AssertionError: 1 != 2"}


@pytest.mark.slow
@pytest.mark.skipif(CLONE is None, reason="TRANSFORMERS_CLONE names no clone of transformers")
@pytest.mark.parametrize("family", suite.FAMILIES)
def test_transformers_own_tests(family, tmp_path):
    options = ["--common", COMMON] if COMMON else []
    options += ["--families", family, "--path", str(tmp_path / "found.json")]
    assert suite.main([str(Path(CLONE)), *options]) == 0
