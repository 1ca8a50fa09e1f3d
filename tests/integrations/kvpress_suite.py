"""kvpress's own tests with our cache and attention instead of DynamicCache and SDPA.

    python -m tests.integrations.kvpress_suite CLONE [--note ...] [--save]

CLONE is a clone of NVIDIA/kvpress: its package and its tests are used, and nothing of either is
kept in this repository. Their test model comes from the network; a random LLaMA and a byte-level
tokenizer stand in for it here. What fails is run again with kvpress as it is: ``fails with
kvpress's own cache too`` is not our doing. ``--save`` writes counts, failures and reasons of skips
to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = ROOT / "benchmarks" / "results" / "kvpress_tests.json"
MODEL = "MaxJeblick/llama2-0b-unit-test"
# The files whose tests compress the cache of the test model. Others need checkpoints or a GPU.
FILES = (
    "presses/test_presses.py", "presses/test_head_compression.py", "presses/test_block_press.py",
    "presses/test_merging_press.py", "presses/test_pyramidkv_press.py", "test_press_call.py",
    "test_per_layer_compression_press.py", "test_decoding_compression.py", "test_generate.py",
    "test_pipeline.py",
)  # fmt: skip
# Tests that look at what kvpress's fake leaves behind, or need what no fused attention has.
GONE = "module.masked_key_indices is None, because the keys are gone"
EXPECTED = {
    r"test_(wrapper_head|head)_compression|test_dms_press_compression_ratio": GONE,
    r"KVCompose|observed_attention": "needs the weights of eager attention",
}


def save_model(folder: Path) -> None:
    """A random model, and a tokenizer of bytes, where tests look for the model by its name."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters]
    words += [f"w{i}" for i in range(len(words), config.vocab_size)]  # what answers decode to
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    for name in (MODEL, MODEL.lower()):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


def run(folder: Path, tests: list[str], cache: str) -> dict[str, dict]:
    """The outcome of every test by its name.

    Raises:
        RuntimeError: the tests could not be run.
    """
    outcomes = folder / "outcomes.json"
    plugins = Path(__file__).parent / "swapped"
    path = os.pathsep.join([str(plugins), str(folder), str(ROOT)])
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "swapped_cache", "-p", "no:cacheprovider",
            "--rootdir", folder, "-c", os.devnull, "-W", "ignore", "--tb=short",
            f"--cache={cache}", f"--outcomes={outcomes}", *tests,
        ],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode not in (0, 1) or not outcomes.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return json.loads(outcomes.read_text())


def summary(tests: dict[str, dict], stock: dict[str, dict]) -> dict:
    """Counts, failures and reasons of skips.

    Args:
        tests: outcomes with ours.
        stock: outcomes with kvpress's own cache, of those that failed.
    """
    failures = []
    for name, one in tests.items():
        if one["outcome"] == "failed":
            text = name + one["reason"]
            why = next((why for pattern, why in EXPECTED.items() if re.search(pattern, text)), "")
            too = stock.get(name, {}).get("outcome") == "failed"
            failures.append({
                "test": name, "reason": one["reason"], "expected": "" if too else why,
                "fails with kvpress's own cache too": too,
            })  # fmt: skip
    skips = Counter(one["reason"] for one in tests.values() if one["outcome"] == "skipped")
    return {
        "counts": dict(sorted(Counter(one["outcome"] for one in tests.values()).items())),
        "failures": failures,
        "skips": dict(sorted(skips.items())),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--note", default="", help="what the sources are, for the file")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    if options.save and not options.note:
        parser.error("--save needs --note: the file says what the sources are")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part in ("tests", "kvpress"):
            shutil.copytree(options.clone / part, folder / part)
        save_model(folder)
        tests = run(folder, [f"tests/{name}" for name in FILES], "ours")
        failed = [name for name, one in tests.items() if one["outcome"] == "failed"]
        found = {
            "sources": options.note,
            "transformers": version("transformers"),
            "torch": version("torch"),
            **summary(tests, run(folder, failed, "stock") if failed else {}),
        }
    print(json.dumps(found, indent=1))
    if options.save:
        PATH.write_text(json.dumps(found, indent=1) + "\n")
    ours = [
        one
        for one in found["failures"]
        if not (one["fails with kvpress's own cache too"] or one["expected"])
    ]
    return int(bool(ours))


if __name__ == "__main__":
    sys.exit(main())
