"""Decode over a cache that keeps a part of its keys, and what key scores cost.

    python -m benchmarks.studies.kept --save

Attention alone, of one new token, in Llama 3's 8B shape (32 query heads on 8 KV heads, D 128). The
contestants take turns over copies that no processor's cache holds:

- all keys, and with the scores of the keys (``AuxRequest(key_scores=1)``);
- a part of them after ``cache.keep``: the same number in each head, and a different number in each.

Rows have tokens/s, and their ratio to the tokens/s over all keys.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from gqa_kernels import (
    AuxRequest,
    DenseKVCache,
    HeadMap,
    PageAllocator,
    PagedKVCache,
    asym_gqa_decode,
)

from ..measure.timing import Run, Settings, time_alternating
from ..report.results import FOLDER, Results, Row, header

PATH = FOLDER / "generate" / "kept.json"
HEADS, KV_HEADS, DIM = 32, 8, 128
PAGE_SIZE = 16
WHOLE, SCORED = "all keys", "all keys, key scores"
OP = "kept"


def budgets(total: int, heads: int) -> list[int]:
    """Keys of each head, ``total`` in all: from a half of the mean to one and a half of it."""
    mean = total / heads
    counts = [round(mean * (0.5 + h / max(heads - 1, 1))) for h in range(heads)]
    counts[-1] += total - sum(counts)
    return counts


def caches(length: int, part: float, dtype: torch.dtype, seed: int) -> dict[str, PagedKVCache]:
    """A cache of ``length`` keys, and two that keep a part of them, by name."""
    generator = torch.Generator().manual_seed(seed)
    total = round(part * length) * KV_HEADS
    counts = {
        WHOLE: [length] * KV_HEADS,
        f"{part:.0%} of the keys": [total // KV_HEADS] * KV_HEADS,
        f"{part:.0%} of the keys, uneven budgets": budgets(total, KV_HEADS),
    }
    k, v = torch.randn(2, 1, KV_HEADS, length, DIM, generator=generator).to(dtype)
    found = {}
    for name, kept in counts.items():
        pages = KV_HEADS * -(-length // PAGE_SIZE)
        allocator = PageAllocator(pages, PAGE_SIZE)  # a sequence for each head
        heads = [allocator.allocate() for _ in range(KV_HEADS)]
        memory = torch.empty(2, pages, PAGE_SIZE, DIM, dtype=dtype)

        def cache_of(batch, memory=memory) -> PagedKVCache:
            table, lengths = batch.page_table[None], batch.lengths[None]
            return PagedKVCache(memory[0], memory[1], table, lengths)

        cache_of(allocator.append(heads, length)).append(k, v)
        if name != WHOLE:
            mask = torch.rand(KV_HEADS, length, generator=generator).argsort(-1).argsort(-1)
            chosen = mask[None] < torch.tensor(kept)[:, None]
            cache_of(allocator.keep(heads, kept)).keep(chosen)
        found[name] = cache_of(allocator.batch(heads))
    return found


def runs(
    length: int, part: float, dtype: torch.dtype, copies: int, backend: str = "auto"
) -> dict[str, Run]:
    """Decode of one token over each of the caches, by name; copies have other values."""
    made = [caches(length, part, dtype, seed) for seed in range(copies)]
    dense = []
    for one in made:  # all heads have as many keys there: one table for all
        whole = one[WHOLE]
        shape = (1, KV_HEADS, length, DIM)
        k, v = (x[whole.page_table[0].long(), 0].reshape(shape) for x in (whole.k, whole.v))
        dense.append(DenseKVCache(k, v, torch.tensor([length], dtype=torch.int32)))
    head_map = HeadMap.uniform(HEADS, KV_HEADS)
    q = torch.randn(1, HEADS, 1, DIM, dtype=dtype)
    found: dict[str, Run] = {
        WHOLE: lambda i: asym_gqa_decode(q, dense[i], head_map, backend=backend),
        SCORED: lambda i: asym_gqa_decode(
            q, dense[i], head_map, backend=backend, return_aux=AuxRequest(key_scores=1)
        ),
    }
    for name in made[0]:
        if name != WHOLE:
            found[name] = lambda i, name=name: asym_gqa_decode(
                q, made[i][name], head_map, backend=backend
            )
    return found


def measure(
    length: int, part: float, dtype: torch.dtype, settings: Settings, copies: int
) -> list[Row]:
    """Rows of one length and type, as results files have them."""
    title = f"decode, {length} keys, {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        timings = time_alternating(
            runs(length, part, dtype, copies), copies, torch.device("cpu"), settings
        )
    whole = timings[WHOLE].median
    return [
        {
            "key": f"{title} | {name}", "case_key": title, "case": {"op": OP, "group": title},
            "contestant": name, "kind": "call", "status": "ok", **dataclasses.asdict(timing),
            "tokens_per_second": 1 / timing.median, "times": whole / timing.median,
        }
        for name, timing in timings.items()
    ]  # fmt: skip


def show(rows: list[Row]) -> None:
    for row in rows:
        print(f"{row['key']:66} {row['tokens_per_second']:8.1f} tokens/s  {row['times']:.2f}x")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--part", type=float, default=0.25, help="of the keys, kept")
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contestant")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--path", type=Path, default=PATH)
    options = parser.parse_args(arguments)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in options.lengths:
            rows += measure(
                length, options.part, dtype, Settings(seconds=options.seconds), options.copies
            )
    show(rows)
    if options.save:
        available = dict.fromkeys((row["contestant"] for row in rows), "available")
        results = Results(header(torch.device("cpu"), OP, available))
        results.add(rows)
        results.save(options.path)


if __name__ == "__main__":
    main()
