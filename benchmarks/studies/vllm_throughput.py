"""SmolLM2-135M in vLLM on a CPU: tokens/s and KV memory, vLLM's own attention against ours.

    python -m benchmarks.studies.vllm_throughput --save
    python -m benchmarks.studies.vllm_throughput --save --dtype float32

Needs a virtual environment with vLLM (the extra `engine`) and `hf`. Each contestant is a process
with an engine; they take turns at the same requests, all sent at once, without prefix caching. The
rows have the median and the quartiles of generated tokens/s, and the bytes of KV memory per token
as the engine allocates it. ``uneven`` is the stock function with its three KV heads split into
five, another map in each layer.

Texts of two contestants differ after a near-tie, which the rounding of bf16 decides. So each token
is also compared with the stock model's choice in fp32 (transformers, the same prefix): is it the
same, and if not, how far is its logit below the largest? If rounding is all that differs, vLLM's
own attention meets that choice no more often than ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report.results import FOLDER, Results, header

PATH = FOLDER / "generate" / "vllm.json"
KV_HEADS = 5  # of the uneven model
STOCK = "stock, vLLM's attention"
CONTESTANTS: dict[str, tuple[str, dict[str, str]]] = {  # checkpoint, and options of vllm.LLM
    STOCK: ("stock", {}),
    "stock, ours": ("stock", {"attention_backend": "ASYM_GQA"}),
    "stock, ours, int8 cache": (
        "stock", {"attention_backend": "ASYM_GQA", "kv_cache_dtype": "int8_per_token_head"},
    ),
    "uneven, ours": ("uneven", {}),
}  # fmt: skip


def write_checkpoints(folder: Path) -> None:
    """SmolLM2 as it is, and with uneven groups."""
    from gqa_kernels.convert import convert, random_split, save
    from gqa_kernels.models.families import attention_layers
    from gqa_kernels.samples.smollm2 import load_smollm2

    loaded = load_smollm2()
    maps = [random_split(x.key_map, KV_HEADS, x.index) for x in attention_layers(loaded.model)]
    save(loaded.model, folder / "stock", processor=loaded.tokenizer)
    child = convert(loaded.model, maps, merging="none")
    save(child, folder / "uneven", processor=loaded.tokenizer)


def serve(folder: Path, options: dict) -> None:
    """A contestant: for each line of requests on stdin, a line of results on stdout."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), enable_prefix_caching=False, enforce_eager=True, **options)
    specs = llm.collective_rpc("get_kv_cache_spec")[0].values()
    size = sum(spec.page_size_bytes / spec.block_size for spec in specs)
    print(json.dumps({"kv_bytes": size}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        sampling = SamplingParams(
            temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        found = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(one.outputs[0].token_ids) for one in found]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


class Contestant:
    """A process that runs :func:`serve`."""

    def __init__(self, folder: Path, options: dict):
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--serve", str(folder), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with status {self.process.wait()}")
        return json.loads(line)

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        print(json.dumps({"prompts": prompts, "new": new}), file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def below_the_best(model: Any, prompts: list[list[int]], written: list[list[int]]) -> Tensor:
    """By how much the logit of each written token is below the largest: ``[requests, new]``.

    Args:
        model: the judge, a language model of transformers.
        prompts: equally long.
    """
    ids = torch.tensor([[*p, *w] for p, w in zip(prompts, written, strict=True)])
    new = len(written[0])
    with torch.no_grad():
        logits = torch.cat(
            [model(row[None], logits_to_keep=new + 1).logits[:, :-1].float() for row in ids]
        )
    return logits.amax(-1) - logits.gather(-1, ids[:, -new:, None])[..., 0]


def run(
    folder: Path, prompts: list[list[int]], new: int, rounds: int, wait: bool, options: dict
) -> list[dict]:
    """A row of each contestant.

    Args:
        wait: for a line on stdin before the timed turns.
        options: of ``vllm.LLM``.
    """
    from transformers import AutoModelForCausalLM

    found = {
        name: Contestant(folder / checkpoint, {**options, **own})
        for name, (checkpoint, own) in CONTESTANTS.items()
    }
    try:
        memory = {name: one.answer()["kv_bytes"] for name, one in found.items()}
        tokens = {name: one.generate(prompts, new)["tokens"] for name, one in found.items()}
        seconds: dict[str, list[float]] = {name: [] for name in found}
        names = list(found)
        if wait:
            input("ready: make the machine quiet, then press Enter")
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(found[name].generate(prompts, new)["seconds"])
    finally:
        for one in found.values():
            one.stop()
    judge = AutoModelForCausalLM.from_pretrained(folder / "stock", dtype=torch.float32)
    rows = []
    for name in found:
        speeds = [len(prompts) * new / s for s in seconds[name]]
        low, middle, high = statistics.quantiles(speeds, n=4)
        pairs = zip(tokens[name], tokens[STOCK], strict=True)
        below = below_the_best(judge, prompts, tokens[name])
        rows.append(
            {
                "key": f"{options['dtype']} {len(prompts)}x{len(prompts[0])}+{new} {name}",
                "contestant": name,
                "dtype": options["dtype"],
                "prompt": len(prompts[0]),
                "new": new,
                "tokens_per_second": middle,
                "low": low,
                "high": high,
                "rounds": rounds,
                "kv_bytes_per_token": memory[name],
                "requests": len(prompts),
                "requests_as_stock": sum(a == b for a, b in pairs),
                "tokens": below.numel(),
                "tokens_as_fp32": int((below == 0).sum()),
                "furthest_below": float(below.max()),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a request")
    parser.add_argument("--new", type=int, default=32, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (2 or more)")
    parser.add_argument("--wait", action="store_true", help="wait for Enter before the turns")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpoints", type=Path, help="folder to keep them in between runs")
    parser.add_argument("--path", type=Path, default=PATH)
    parser.add_argument("--save", action="store_true", help="add the rows to the file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(Path(options.serve[0]), json.loads(options.serve[1]))
        return

    from transformers import AutoTokenizer

    from gqa_kernels.samples.text import calibration_text, rows

    available = dict.fromkeys(CONTESTANTS, "available")
    results = Results(header(torch.device("cpu"), "generate", available, None))
    if options.save and options.path.exists():
        results.resume(Results.load(options.path), options.path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoints or Path(temporary)
        if not (folder / "uneven").exists():
            write_checkpoints(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder / "stock")
        prompts = rows(tokenizer, calibration_text(), (options.requests, options.prompt))
        engine = {
            "dtype": options.dtype, "max_model_len": options.prompt + options.new,
            "kv_cache_memory_bytes": 1 << 30,
        }  # fmt: skip
        found = run(folder, prompts.tolist(), options.new, options.rounds, options.wait, engine)
    for row in found:
        print(
            f"{row['contestant']:26} {row['tokens_per_second']:7.1f} tokens/s "
            f"({row['low']:.1f} to {row['high']:.1f})  "
            f"{row['kv_bytes_per_token'] / 1024:.1f} KiB a token  "
            f"{row['requests_as_stock']} of {row['requests']} requests as stock  "
            f"{row['tokens_as_fp32']} of {row['tokens']} tokens the fp32 model's choice, "
            f"the furthest {row['furthest_below']:.3f} below it"
        )
    if options.save:
        results.add(found)
        results.save(options.path)


if __name__ == "__main__":
    main()
