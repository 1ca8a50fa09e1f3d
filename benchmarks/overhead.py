"""What a call costs beside its work: attention of one key, short contexts, and steps over a cache.

``python -m benchmarks.overhead --save`` writes ``results/DEVICE/overhead.json``, which
``python -m benchmarks.report`` shows. CPU only. The calls of a group take turns, on one input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence

# Spinning OpenMP threads slow a shared machine 25 times; OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    plan_decode,
)
from gqa_kernels.cache.base import KVCache
from gqa_kernels.native import build

from .display import seconds
from .results import FOLDER, Results, Row, folder_name, header
from .timing import Settings, time_alternating

OP = "overhead"
SDPA = "SDPA"  # the call that others of its group are compared with
HEADS, KV_HEADS, DIM = 32, 8, 128  # Llama 3 8B
CONTEXTS = (128, 512, 1024)
BATCHES = (1, 8)
PAGE_SIZE, PAGES, LENGTH = 16, 8, 20  # short sequences, whose attention takes next to nothing
TYPES = (torch.bfloat16, torch.float32)

Calls = dict[str, Callable[[int], object]]


def groups() -> Iterator[tuple[str, Calls]]:
    """Calls that take turns, by name, and what they have in common."""
    yield "one key, one head, D 16, float32", _one_key()
    for dtype in TYPES:
        for length in CONTEXTS:
            name = str(dtype).removeprefix("torch.")
            title = f"decode, {length} keys, {HEADS} on {KV_HEADS} heads, D {DIM}, {name}"
            yield title, _decode(length, dtype)
    for kind in ("dense", f"pages of {PAGE_SIZE}"):
        for batch in BATCHES:
            title = f"cache ({kind}), {LENGTH} keys, {HEADS} on {KV_HEADS} heads, batch {batch}"
            yield title, _cache_steps(_cache(kind == "dense", batch))


def _one_key() -> Calls:
    """Nothing to compute: what is left is the call."""
    q, k, v = torch.randn(3, 1, 1, 1, 16).unbind()
    head_map, ops = HeadMap([0]), torch.ops.gqa_kernels
    entries = head_map.cpu_tensor
    options = (None,) * 5 + (0.25, -1, -1, 0.0, False)
    return {
        "asym_gqa_attention": lambda _: asym_gqa_attention(q, k, v, head_map),
        "op plain_attention_forward": lambda _: ops.plain_attention_forward(
            q, k, v, entries, 1, None, False, False
        ),
        "op attention_forward": lambda _: ops.attention_forward(q, k, v, entries, *options),
        SDPA: lambda _: scaled_dot_product_attention(q, k, v),
        "torch.empty_like": lambda _: torch.empty_like(q),
    }


def _decode(length: int, dtype: torch.dtype) -> Calls:
    q = torch.randn(1, HEADS, 1, DIM, dtype=dtype)
    k, v = torch.randn(2, 1, KV_HEADS, length, DIM, dtype=dtype).unbind()
    head_map = HeadMap.uniform(HEADS, KV_HEADS)
    return {
        "asym_gqa_attention": lambda _: asym_gqa_attention(q, k, v, head_map),
        SDPA: lambda _: scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }


def _cache(dense: bool, batch: int) -> KVCache:
    lengths = torch.full((batch,), LENGTH, dtype=torch.int32)
    if dense:
        capacity = PAGES * PAGE_SIZE
        cache = DenseKVCache.empty(batch, KV_HEADS, capacity, DIM, dtype=torch.bfloat16)
        cache.lengths.copy_(lengths)
    else:
        pool = PagedKVCache.empty(batch * PAGES, PAGE_SIZE, KV_HEADS, DIM, dtype=torch.bfloat16)
        table = torch.arange(batch * PAGES, dtype=torch.int32).view(batch, PAGES)
        cache = pool.at(table, lengths)
    cache.k.normal_()
    cache.v.normal_()
    return cache


def _cache_steps(cache: KVCache) -> Calls:
    batch = cache.lengths.shape[0]
    q = torch.randn(batch, HEADS, 1, DIM, dtype=torch.bfloat16)
    new = torch.randn(batch, KV_HEADS, 1, DIM, dtype=torch.bfloat16)
    head_map = HeadMap.uniform(HEADS, KV_HEADS)
    plan = plan_decode(q, cache, head_map)

    def step(_: int) -> Tensor:
        return asym_gqa_decode(q, cache, head_map, k_new=new, v_new=new, advance=False)

    return {
        "append": lambda _: cache.append(new, new, advance=False),
        "decode": lambda _: asym_gqa_decode(q, cache, head_map),
        "append and decode": step,
        "decode, planned": lambda _: plan(q, cache),
        "append and decode, planned": lambda _: plan(q, cache, new, new),
        "plan": lambda _: plan_decode(q, cache, head_map),
    }


def measure(title: str, calls: Calls, settings: Settings) -> list[Row]:
    """Rows of a group, as results files have them."""
    with torch.no_grad():
        timings = time_alternating(calls, 1, torch.device("cpu"), settings)
    return [
        {
            "key": f"{title} | {name}", "case_key": title, "case": {"op": OP, "group": title},
            "contestant": name, "kind": "call", "status": "ok", **dataclasses.asdict(timing),
        }
        for name, timing in timings.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="per call (0.3)")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument("--save", action="store_true", help=f"write {FOLDER.name}/DEVICE/{OP}.json")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    build.load()
    results = Results(header(torch.device("cpu"), OP, {}))
    for title, calls in groups():
        rows = measure(title, calls, Settings(seconds=arguments.seconds))
        results.add(rows)
        print(title)
        for row in rows:
            print(f"  {row['contestant']:28} {seconds(row['median'])}", flush=True)
    if arguments.save:
        results.save(FOLDER / folder_name(results.header) / f"{OP}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
