"""SmolLM2-135M with a context that presses of kvpress compress: perplexity, tokens/s, KV memory.

    python -m benchmarks.studies.pressed --context 2048 --ratios 0.5 0.75 0.9 --save

It compares the whole context (stock SDPA, and ours), the same number of keys in each head (SnapKV),
and a different number in each head (AdaKV over SnapKV). Each runs with kvpress alone, which masks
keys and keeps them, and on our cache, which drops them. Every contestant reads the context once.
Then they take turns at the same tokens of the text after it, one by one, and crop their caches.
Rows have the median and the quartiles of tokens/s, the bytes of the storages behind keys and
values, and the perplexity of those tokens. Pictures of all three are drawn beside the file.
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
from .generate import held_bytes

PATH = FOLDER / "generate" / "pressed.json"
WINDOW = 32  # queries that SnapKV scores keys by
STOCK, OURS = "all keys, SDPA", "all keys, ours"
EVEN, FAKED, HEADS = "SnapKV, ours", "AdaKV, kvpress", "AdaKV, ours"


@dataclass
class Contestant:
    """A model on an attention, a cache for it, and a press.

    Attributes:
        ratio: part of the keys that the press drops.
        positions: of the cache after the press.
        context: tokens before it.
    """

    model: nn.Module
    attention: str
    make_cache: Callable[[], Any]
    press: Any
    ratio: float
    cache: Any = None
    positions: tuple[int, ...] = ()
    context: int = 0

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> None:
        """Compress a context ``[1, S]``."""
        self.model.set_attn_implementation(self.attention)
        self.cache, self.context = self.make_cache(), ids.shape[1]
        with self.press(self.model):
            self.model.model(input_ids=ids, past_key_values=self.cache)
        self.positions = tuple(self.cache.get_seq_length(i) for i in range(len(self.cache.layers)))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> tuple[float, Tensor]:
        """Seconds for tokens ``[1, n]`` one by one, and the logits after each ``[n, V]``; the cache
        is as before then, and what a press has masked stays masked."""
        self.model.set_attn_implementation(self.attention)
        masks = [layer.self_attn.__dict__.get("masked_key_indices") for layer in self._layers]
        logits = []
        start = time.perf_counter()
        for i, token in enumerate(tokens.split(1, dim=1)):
            at = torch.tensor([[self.context + i]])
            out = self.model(token, past_key_values=self.cache, position_ids=at)
            logits.append(out.logits[0])
        seconds = time.perf_counter() - start
        for layer, positions, attention, mask in zip(
            self.cache.layers, self.positions, self._layers, masks, strict=True
        ):
            layer.keys, layer.values = (x[:, :, :positions] for x in (layer.keys, layer.values))
            attention.self_attn.masked_key_indices = mask if self.attention == "sdpa" else None
        return seconds, torch.cat(logits)

    @property
    def _layers(self) -> nn.ModuleList:
        return self.model.model.layers


def contestants(
    model: nn.Module, ratios: list[float], backend: str, window: int = WINDOW
) -> dict[str, Contestant]:
    """By name and ratio; stock SDPA over all keys first. Those with keys that kvpress masks need a
    model each, because it writes to the modules."""
    from copy import copy, deepcopy

    from kvpress import AdaKVPress, KnormPress, SnapKVPress
    from transformers import DynamicCache

    from gqa_kernels.integrations.kvpress import PressedCache, register

    ours = register("asym_gqa_pressed", backend=backend)

    def stock_cache() -> Any:
        return DynamicCache(config=model.config)

    def our_cache() -> Any:
        return PressedCache(model.config)

    def another() -> nn.Module:
        """The model with modules of its own and the same weights."""
        memo = {id(x): x for x in (*model.parameters(), *model.buffers(), model.config)}
        return deepcopy(model, memo)

    nothing = KnormPress(compression_ratio=0.0)
    found = {
        STOCK: Contestant(model, "sdpa", stock_cache, nothing, 0.0),
        OURS: Contestant(model, ours, our_cache, nothing, 0.0),
    }
    for ratio in ratios:
        snap = SnapKVPress(compression_ratio=ratio, window_size=window)
        for name, attention, make, press in (
            (EVEN, ours, our_cache, snap),
            (FAKED, "sdpa", stock_cache, AdaKVPress(copy(snap))),
            (HEADS, ours, our_cache, AdaKVPress(copy(snap))),
        ):
            of = another() if name == FAKED else model
            found[f"{name} {ratio}"] = Contestant(of, attention, make, press, ratio)
    return found


def run(found: dict[str, Contestant], ids: Tensor, steps: int, rounds: int) -> list[dict]:
    """Rows of contestants that were given a context.

    Args:
        ids: ``[1, n + 1]``, the text after it: ``n`` tokens give the perplexity.
        steps: tokens of a turn, the first of them.
        rounds: turns of each, 2 or more.
    """
    facts = {name: weigh(one, ids) for name, one in found.items()}
    seconds = take_turns(found, ids[:, :steps], rounds)
    rows = []
    for name, one in found.items():
        low, middle, high = statistics.quantiles(
            [steps / s for s in seconds[name]], n=4, method="inclusive"
        )
        rows.append(
            {
                "key": f"{one.context} {name}",
                "context": one.context,
                "contestant": name,
                "dropped": one.ratio,
                "tokens_per_second": middle,
                "low": low,
                "high": high,
                "rounds": rounds,
                "steps": steps,
                "text": ids.shape[1] - 1,
                **facts[name],
            }
        )
    return rows


def weigh(one: Contestant, ids: Tensor) -> dict[str, float]:
    """Bytes of a contestant's cache, and its perplexity of a text ``[1, n + 1]``. The first token
    also makes our cache store in pages what it holds."""
    _, logits = one.decode(ids[:, :-1])
    loss = nn.functional.cross_entropy(logits.float(), ids[0, 1:])
    return {"kv_bytes": held_bytes(one.cache), "perplexity": float(loss.exp())}


def take_turns(found: dict[str, Contestant], tokens: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn; every turn begins with another contestant."""
    names, seconds = list(found), {name: [] for name in found}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(found[name].decode(tokens)[0])
    return seconds


def show(rows: list[dict]) -> None:
    stock = rows[0]
    print(f"{stock['context']} tokens, {stock['rounds']} rounds of {stock['steps']}")
    for row in rows:
        print(
            f"  {row['contestant']:22} {row['tokens_per_second']:7.2f} tokens/s "
            f"({row['tokens_per_second'] / stock['tokens_per_second']:.2f}x)  "
            f"KV {row['kv_bytes'] / 2**20:7.1f} MiB "
            f"({row['kv_bytes'] / stock['kv_bytes']:.2f}x)  perplexity {row['perplexity']:.2f}"
        )


def pictures(rows: list[dict], path: Path) -> list[Path]:
    """KV memory, tokens/s and perplexity against the keys kept, beside a results file."""
    from gqa_kernels.reporting.plots import lines

    drawn = []
    for name, label, value in (
        ("memory", "MiB of keys and values", lambda row: row["kv_bytes"] / 2**20),
        ("speed", "tokens/s", lambda row: row["tokens_per_second"]),
        ("perplexity", "perplexity", lambda row: row["perplexity"]),
    ):
        named: dict[str, dict[float, float]] = {EVEN: {}, FAKED: {}, HEADS: {}}
        for row in rows:
            contestant = row["contestant"]
            of = {STOCK: (FAKED,), OURS: (EVEN, HEADS)}.get(
                contestant, (contestant.rpartition(" ")[0],)
            )
            for line in of:
                named[line][100 * (1 - row["dropped"])] = value(row)
        target = path.with_name(f"{path.stem}-{name}.svg")
        drawn.append(lines(named, "% of the keys kept", label, target))
    return drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--text", type=int, default=128, help="tokens for the perplexity")
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (2 or more)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--path", type=Path, default=PATH)
    parser.add_argument("--save", action="store_true", help="write the file and its pictures")
    parser.add_argument("--pictures", action="store_true", help="draw the file again; run nothing")
    options = parser.parse_args(arguments)
    if options.pictures:
        pictures(Results.load(options.path).rows, options.path)
        return

    from gqa_kernels.models.fingerprint import fingerprint
    from gqa_kernels.samples.smollm2 import load_smollm2
    from gqa_kernels.samples.text import evaluation_text
    from gqa_kernels.samples.text import rows as token_rows

    torch.set_num_threads(options.threads)
    loaded = load_smollm2()
    length = options.context + options.text + 1
    ids = token_rows(loaded.tokenizer, evaluation_text(), (1, length))
    given = {name: getattr(options, name) for name in ("text", "steps", "rounds", "backend")}
    made_from = fingerprint(loaded.model, [ids], **given)
    found = contestants(loaded.model, options.ratios, options.backend)
    for one in found.values():
        one.prefill(ids[:, : options.context])
    rows = run(found, ids[:, options.context :], options.steps, options.rounds)
    show(rows)
    if options.save:
        available = dict.fromkeys(found, "available")
        results = Results(header(torch.device("cpu"), "pressed", available, made_from))
        results.add(rows)
        results.save(options.path)
        pictures(rows, options.path)


if __name__ == "__main__":
    main()
