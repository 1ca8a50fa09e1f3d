"""SmolLM2-135M in transformers: decode tokens/s, KV memory and text, ours against stock SDPA.

    python -m benchmarks.studies.generate --contexts 2048 8100 --save

Every contestant fills a cache of its own with the same text once; then they take turns at decoding
the same few tokens after it, crop the cache and begin again. The rows have the median and the
quartiles of tokens/s, and the bytes of the storages behind keys and values after the prompt. Greedy
tokens, ``--text`` of them, are compared with stock SDPA's. The stock model's groups are even;
``uneven`` is the same function with its three KV heads split into five, another map in each layer.
Contexts in the file are not run again (same device, threads and commit).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..report.results import FOLDER, Results, header

PATH = FOLDER / "generate" / "smollm2.json"
KV_HEADS = 5  # of the uneven model
STOCK = "stock SDPA"


@dataclass
class Contestant:
    """A model on an attention, and a cache for it."""

    model: nn.Module
    attention: str
    make_cache: Callable[[], Any]
    cache: Any = None

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> int:
        """Fill a new cache; bytes of the storages that it holds then."""
        self.cache = self.make_cache()
        self._forward(prompt)
        return held_bytes(self.cache)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> float:
        """Seconds for these tokens one by one; the cache is as before then."""
        start = time.perf_counter()
        for token in tokens.split(1, dim=1):
            self._forward(token)
        seconds = time.perf_counter() - start
        self.cache.crop(-tokens.shape[1])
        return seconds

    @torch.inference_mode()
    def greedy(self, token: Tensor, count: int) -> Tensor:
        """``[1, count]``, what follows the prompt and ``token``; the cache is as before then."""
        found = []
        for _ in range(count):
            token = self._forward(token).argmax(-1, keepdim=True)
            found.append(token)
        self.cache.crop(-count)
        return torch.cat(found, 1)

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits ``[1, V]`` after the last of ``[1, S]`` tokens."""
        self.model.set_attn_implementation(self.attention)
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


def held_bytes(cache: Any) -> int:
    """Bytes of the storages of a cache's keys and values, of scales too; each once."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    storages = [x.untyped_storage() for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def contestants(stock: nn.Module, backend: str) -> dict[str, Contestant]:
    """By name; stock SDPA first."""
    from transformers import DynamicCache

    from gqa_kernels.convert import convert, random_split
    from gqa_kernels.integrations.transformers import PagedCache, register
    from gqa_kernels.models.families import attention_layers

    ours = register("asym_gqa_timed", backend=backend)
    layers = attention_layers(stock)
    maps = [random_split(layer.key_map, KV_HEADS, layer.index) for layer in layers]
    uneven = convert(stock, maps, merging="none")
    config = stock.config
    return {
        STOCK: Contestant(stock, "sdpa", lambda: DynamicCache(config=config)),
        "ours, DynamicCache": Contestant(stock, ours, lambda: DynamicCache(config=config)),
        "ours, DynamicCache, uneven": Contestant(
            uneven, ours, lambda: DynamicCache(config=uneven.config)
        ),
        "ours, PagedCache": Contestant(stock, ours, lambda: PagedCache(config)),
        "ours, PagedCache int8": Contestant(stock, ours, lambda: PagedCache(config, format="int8")),
        "ours, PagedCache, uneven": Contestant(uneven, ours, lambda: PagedCache(uneven.config)),
    }


def run(
    found: dict[str, Contestant], ids: Tensor, steps: int, rounds: int, text: int
) -> list[dict]:
    """Rows of one context.

    Args:
        ids: ``[1, context + 1]``: the prompt, and the first token to decode.
        steps: tokens decoded by each contestant in each round.
        text: greedy tokens to compare, ``steps`` at least.
    """
    context = ids.shape[1] - 1
    prompt, first = ids[:, :-1], ids[:, -1:]
    memory = {name: one.prefill(prompt) for name, one in found.items()}
    tokens = {name: one.greedy(first, max(text, steps)) for name, one in found.items()}
    fed = torch.cat([first, tokens[STOCK][:, : steps - 1]], 1)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds):
        names = list(found)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(found[name].decode(fed))
    rows = []
    for name in found:
        low, middle, high = statistics.quantiles([steps / s for s in seconds[name]], n=4)
        rows.append(
            {
                "key": f"{context} {name}",
                "context": context,
                "contestant": name,
                "tokens_per_second": middle,
                "low": low,
                "high": high,
                "rounds": rounds,
                "steps": steps,
                "kv_bytes": memory[name],
                "text": tokens[name].shape[1],
                "tokens_as_stock": int((tokens[name] == tokens[STOCK]).long().cumprod(1).sum()),
            }
        )
    for one in found.values():
        one.cache = None
    return rows


def show(rows: list[dict]) -> None:
    stock = next(row for row in rows if row["contestant"] == STOCK)
    print(f"{stock['context']} tokens, {stock['rounds']} rounds of {stock['steps']}")
    for row in rows:
        print(
            f"  {row['contestant']:26} {row['tokens_per_second']:7.2f} tokens/s "
            f"({row['tokens_per_second'] / stock['tokens_per_second']:.2f}x)  "
            f"KV {row['kv_bytes'] / 2**20:7.1f} MiB  "
            f"first {row['tokens_as_stock']} of {row['text']} tokens as stock"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8100])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (2 or more)")
    parser.add_argument("--text", type=int, default=128, help="greedy tokens to compare")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--path", type=Path, default=PATH)
    parser.add_argument("--save", action="store_true", help="write, and go on with, the file")
    options = parser.parse_args(arguments)

    from gqa_kernels.models.fingerprint import fingerprint
    from gqa_kernels.samples.smollm2 import load_smollm2
    from gqa_kernels.samples.text import calibration_text
    from gqa_kernels.samples.text import rows as token_rows

    torch.set_num_threads(options.threads)
    loaded = load_smollm2()
    text = calibration_text()
    tokens = torch.tensor(loaded.tokenizer.encode(text, add_special_tokens=False))
    given = {name: getattr(options, name) for name in ("steps", "rounds", "text", "backend")}
    made_from = fingerprint(loaded.model, [tokens], **given)
    found = contestants(loaded.model.to(getattr(torch, options.dtype)), options.backend)
    available = dict.fromkeys(found, "available")
    results = Results(header(torch.device("cpu"), "generate", available, made_from))
    if options.save and options.path.exists():
        results.resume(Results.load(options.path), options.path)
    for context in options.contexts:
        done = [row for row in results.rows if row["key"].startswith(f"{options.dtype} {context} ")]
        if not done:
            ids = token_rows(loaded.tokenizer, text, (1, context + 1))
            done = run(found, ids, options.steps, options.rounds, options.text)
            for row in done:
                row.update(key=f"{options.dtype} {row['key']}", dtype=options.dtype)
            results.add(done)
            if options.save:
                results.save(options.path)
        show(done)


if __name__ == "__main__":
    main()
