"""Calls whose work is next to nothing, so that their time is that of Python, checks and dispatch.

Public functions only: :mod:`.overhead` runs this file on another checkout's package too, as
``python -m benchmarks.studies.host_calls --package PATH``, which prints JSON. So nothing of
``gqa_kernels`` is imported before that path is known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..measure.timing import Settings, time_alternating

SDPA = "SDPA"  # the call that others of its group are compared with
PLAIN = "plain"  # where there is no SDPA: the call without options
HEADS, KV_HEADS, DIM, KEYS = 4, 2, 16, 4
PAGE_SIZE, PAGES = 16, 2
ENTRIES = [0, 0, 1, 1]

Calls = dict[str, Callable[[int], object]]


def groups() -> Iterator[tuple[str, Calls]]:
    """Calls that take turns, by name, and what they have in common."""
    shape = f"{KEYS} keys, {HEADS} on {KV_HEADS} heads, D {DIM}, float32"
    yield f"attention, {shape}", attention_calls()
    for kind in ("dense", f"pages of {PAGE_SIZE}"):
        yield f"decode over a cache ({kind}), {shape}", cache_calls(kind == "dense")
    yield f"packed sequences, {shape}", packed_calls()


def attention_calls() -> Calls:
    from gqa_kernels import HeadMap, asym_gqa_attention

    q, k, v = (torch.randn(1, n, 1 if n == HEADS else KEYS, DIM) for n in (HEADS, 2, 2))
    head_map, sinks = HeadMap(ENTRIES), torch.randn(HEADS)

    def call(given: object = head_map, **options: object) -> Callable[[int], object]:
        return lambda _: asym_gqa_attention(q, k, v, given, **options)

    return {
        PLAIN: call(),
        "softcap": call(softcap=30.0),
        "window": call(causal=True, window=(2, 0)),
        "sinks": call(sinks=sinks),
        "map as a list": call(ENTRIES),
        "softcap, window, sinks": call(softcap=30.0, window=(2, 0), sinks=sinks),
        SDPA: lambda _: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "torch.empty_like": lambda _: torch.empty_like(q),
    }


def cache_calls(dense: bool) -> Calls:
    from gqa_kernels import DenseKVCache, HeadMap, PagedKVCache, asym_gqa_decode, plan_decode

    lengths = torch.tensor([KEYS], dtype=torch.int32)
    kind = {"dtype": torch.float32}
    if dense:
        cache = DenseKVCache.empty(1, KV_HEADS, PAGES * PAGE_SIZE, DIM, **kind)
        cache.lengths.copy_(lengths)
    else:
        pool = PagedKVCache.empty(PAGES, PAGE_SIZE, KV_HEADS, DIM, **kind)
        cache = pool.at(torch.arange(PAGES, dtype=torch.int32)[None], lengths)
    for memory in (cache.k, cache.v):
        memory.normal_()
    q, new = torch.randn(1, HEADS, 1, DIM), torch.randn(1, KV_HEADS, 1, DIM)
    head_map, sinks = HeadMap(ENTRIES), torch.randn(HEADS)
    plan = plan_decode(q, cache, head_map)
    appended = {"k_new": new, "v_new": new, "advance": False}

    def call(given: object = head_map, **options: object) -> Callable[[int], object]:
        return lambda _: asym_gqa_decode(q, cache, given, **options)

    return {
        PLAIN: call(),
        "softcap": call(softcap=30.0),
        "window": call(window=(2, 0)),
        "sinks": call(sinks=sinks),
        "map as a list": call(ENTRIES),
        "new tokens": call(**appended),
        "new tokens, softcap": call(softcap=30.0, **appended),
        "append alone": lambda _: cache.append(new, new, advance=False),
        "planned": lambda _: plan(q, cache),
        "new tokens, planned": lambda _: plan(q, cache, new, new),
        "plan": lambda _: plan_decode(q, cache, head_map),
    }


def packed_calls() -> Calls:
    from gqa_kernels import HeadMap, asym_gqa_varlen_attention

    q, k, v = (torch.randn(2 * KEYS, n, DIM) for n in (HEADS, 2, 2))
    head_map, offsets = HeadMap(ENTRIES), torch.tensor([0, KEYS, 2 * KEYS], dtype=torch.int32)

    def call(given: object = head_map, **options: object) -> Callable[[int], object]:
        return lambda _: asym_gqa_varlen_attention(
            q, k, v, given, offsets, offsets, KEYS, KEYS, causal=True, **options
        )

    return {
        PLAIN: call(),
        "softcap": call(softcap=30.0),
        "window": call(window=(2, 0)),
        "map as a list": call(ENTRIES),
    }


def medians(seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of each call, by group and name."""
    with torch.no_grad():
        return {
            title: {
                name: timing.median
                for name, timing in time_alternating(
                    calls, 1, torch.device("cpu"), Settings(seconds=seconds)
                ).items()
            }
            for title, calls in groups()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder that has gqa_kernels")
    parser.add_argument("--seconds", type=float, default=0.3, help="per call (0.3)")
    arguments = parser.parse_args()
    root = arguments.package.resolve()
    sys.path.insert(0, str(root))
    import gqa_kernels

    found = Path(gqa_kernels.__file__).resolve()
    if not found.is_relative_to(root):
        raise SystemExit(f"gqa_kernels must be that of {root}, got {found}")
    torch.set_num_threads(1)  # the work is smaller than what a second thread costs
    print(json.dumps(medians(arguments.seconds)))


if __name__ == "__main__":
    main()
