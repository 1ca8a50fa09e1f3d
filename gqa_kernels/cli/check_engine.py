"""``gqa-kernels check-engine``: does an engine write what transformers writes?

Run it on a machine on which the engine is installed; vLLM also runs on a CPU. It loads SmolLM2
twice: unchanged, and with uneven, interleaved KV heads under another map in each layer, which
computes the same function. Both models generate greedily in fp32, in the engine with our backend
and in transformers with ``asym_gqa``, and their tokens are compared. Exit status 0: all are equal;
1: some differ; 2: it could not run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..reporting.errors import UsageError
from .arguments import count
from .outcome import Outcome

if TYPE_CHECKING:
    import torch

SUMMARY = "compare an engine's text with transformers'"
EXAMPLE = "gqa-kernels check-engine vllm"
PROMPTS = (
    "The three primary colours are",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time there was a mapmaker who",
)
KV_MEMORY = 1 << 30  # bytes
Tokens = list[list[int]]


def vllm(folder: Path, converted: bool, prompts: Tokens, new_tokens: int) -> Tokens:
    """Greedy continuations by vLLM.

    Raises:
        UsageError: vLLM chose another attention backend than ours.
    """
    from ..integrations import vllm as integration

    integration.register()
    # vLLM calls our function `attention_classes` in its engine process.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), dtype="float32", max_model_len=512,
        attention_backend=integration.BACKEND, kv_cache_memory_bytes=KV_MEMORY,
    )  # fmt: skip
    chosen = engine.apply_model(attention_classes)[0]
    if chosen != ["AsymGQAImpl"]:
        raise UsageError(f"vLLM must run AsymGQAImpl for {integration.BACKEND}, got {chosen}")
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    return [list(one.outputs[0].token_ids) for one in found]


def attention_classes(model: torch.nn.Module) -> list[str]:
    """Names of the classes that compute attention in a vLLM model."""
    from vllm.model_executor.layers.attention import Attention

    return sorted({type(x.impl).__name__ for x in model.modules() if isinstance(x, Attention)})


def sglang(folder: Path, converted: bool, prompts: Tokens, new_tokens: int) -> Tokens:
    """Greedy continuations by SGLang."""
    from ..integrations import sglang as integration

    integration.register()
    from sglang import Engine

    engine = Engine(
        model_path=str(folder), dtype="float32", attention_backend=integration.BACKEND,
        context_length=512, mem_fraction_static=0.4,
    )  # fmt: skip
    try:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        found = engine.generate(input_ids=prompts, sampling_params=sampling)
        return [list(one["output_ids"]) for one in found]
    finally:
        engine.shutdown()


ENGINES: dict[str, Callable[[Path, bool, Tokens, int], Tokens]] = {"vllm": vllm, "sglang": sglang}


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "check-engine",
        help=SUMMARY,
        description="Prints for each model and prompt how many tokens are equal.",
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--new-tokens", type=count, default=32, help="(%(default)s)")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = check(ENGINES[arguments.engine], arguments.new_tokens, device)
    equal = all(one.same == one.tokens for one in found)
    return Outcome([one._asdict() for one in found], 0 if equal else 1)


class Compared(NamedTuple):
    """How many of a model's tokens after a prompt equal the engine's, up to the first that
    differs."""

    model: str
    prompt: str
    same: int
    tokens: int


def check(generate: Callable, new_tokens: int, device: str) -> list[Compared]:
    """Print a line per model and prompt, and return the same facts.

    Args:
        generate: a function like :func:`vllm`.
        new_tokens: tokens to generate for each prompt.
        device: where transformers runs.
    """
    from ..convert import convert, random_split, save
    from ..integrations.transformers import register
    from ..models.families import attention_layers
    from ..samples.smollm2 import load_smollm2

    loaded = load_smollm2()
    layers = attention_layers(loaded.model)
    maps = [random_split(layer.key_map, 5, layer.index) for layer in layers]
    models = {"even": loaded.model, "converted": convert(loaded.model, maps, merging="none")}
    prompts = [loaded.tokenizer.encode(text) for text in PROMPTS]
    compared = []
    for name, model in models.items():
        model.set_attn_implementation(register())
        model.to(device)
        expected = [greedy(model, ids, new_tokens) for ids in prompts]
        model.to("cpu")
        with tempfile.TemporaryDirectory() as folder:
            target = save(model, Path(folder) / name, processor=loaded.tokenizer)
            found = generate(target, name == "converted", prompts, new_tokens)
        for text, theirs, ours in zip(PROMPTS, expected, found, strict=True):
            same = next((i for i, pair in enumerate(zip(theirs, ours, strict=False))
                         if pair[0] != pair[1]), min(len(theirs), len(ours)))  # fmt: skip
            compared.append(Compared(name, text, same, len(theirs)))
            print(f"{name}: {same} of {len(theirs)} tokens equal after {text!r}")
    return compared


def greedy(model: torch.nn.Module, ids: list[int], new_tokens: int) -> list[int]:
    """The continuation of a prompt by transformers."""
    import torch

    given = torch.tensor([ids], device=model.device)
    out = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()
