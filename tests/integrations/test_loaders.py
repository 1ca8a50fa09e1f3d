"""No loader computes equal groups for an uneven child: each raises an error or computes it rightly.

Here are those that load through transformers, in a process without this package. The others:
``tests/engine/test_vllm_loaders.py`` (vLLM), ``test_sglang.py``, ``test_hf_kernels.py`` (reads the
maps), and ``tests/cli/test_serve.py`` (``transformers serve``).
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, save
from gqa_kernels.integrations.transformers import register
from tests.tiny_models import tiny, write_tokenizer

# Counts that divide: 6 query heads over 3 KV heads would make three groups of two.
MAPS = [HeadMap([0, 0, 0, 1, 2, 2]), HeadMap([2, 0, 1, 1, 1, 0])]
LOADERS = {  # the package that it needs, and what a user writes
    "AutoModelForCausalLM": ("transformers", "AutoModelForCausalLM.from_pretrained(child)"),
    "AutoModel": ("transformers", "AutoModel.from_pretrained(child)"),
    "another head": ("transformers", "AutoModelForSequenceClassification.from_pretrained(child)"),
    "the stock class": ("transformers", "LlamaForCausalLM.from_pretrained(child)"),
    "sdpa": (
        "transformers", "AutoModelForCausalLM.from_pretrained(child, attn_implementation='sdpa')"
    ),
    "eager": (
        "transformers", "AutoModelForCausalLM.from_pretrained(child, attn_implementation='eager')"
    ),
    "from_config": (
        "transformers", "AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(child))"
    ),
    "pipeline": ("transformers", "pipeline('text-generation', model=child)"),
    "PEFT": ("peft", "peft.AutoPeftModelForCausalLM.from_pretrained(adapter)"),
    "kvpress": ("kvpress", "pipeline('kv-press-text-generation', model=child)"),
    "lm-eval": ("lm_eval", "lm_eval.models.huggingface.HFLM(pretrained=child, device='cpu')"),
}  # fmt: skip
PROGRAM = """
import importlib, json, sys
sys.modules["gqa_kernels"] = None
child, adapter, loaders = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
    LlamaForCausalLM, pipeline,
)
found = {}
for name, (package, code) in loaders.items():
    globals()[package] = importlib.import_module(package)
    if package == "lm_eval":
        import lm_eval.models.huggingface
    try:
        eval(code)
        found[name] = "loaded"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["save", "save_pretrained"])
def answers(request, tmp_path_factory):
    """What each installed loader says to an uneven child."""
    register()
    folder = tmp_path_factory.mktemp("loaders")
    child, adapter = folder / "child", folder / "adapter"
    model = convert(tiny("llama", 6, 6), MAPS)
    if request.param == "save":
        save(model, child)
    else:
        model.save_pretrained(child)
    write_tokenizer(child)
    adapter.mkdir()
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2}
    text = json.dumps({**lora, "base_model_name_or_path": str(child)})
    (adapter / "adapter_config.json").write_text(text)
    installed = {name: x for name, x in LOADERS.items() if find_spec(x[0])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(child), str(adapter), json.dumps(installed)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LOADERS)
def test_refuses(answers, name):
    if name not in answers:
        pytest.skip(f"needs {LOADERS[name][0]}")
    assert "asym_gqa" in answers[name] and answers[name] != "loaded"
