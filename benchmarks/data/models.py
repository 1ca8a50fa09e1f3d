"""Attention shapes of real models, and the head maps over their heads, as data."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from gqa_kernels import HeadMap


@dataclass(frozen=True)
class Model:
    """Attention of one layer.

    Attributes:
        num_heads, num_kv_heads, head_dim: as published.
        causal: whether a token sees only those before it.
        relative_bias: an additive bias per head and distance, as T5 has it, is an input too.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    relative_bias: bool = False


MODELS = {
    "llama-2-7b": Model(32, 32, 128),
    "opt-1.3b": Model(32, 32, 64),
    "llama-3-8b": Model(32, 8, 128),
    "llama-3.2-1b": Model(32, 8, 64),
    "llama-3-70b": Model(64, 8, 128),
    "qwen2.5-7b": Model(28, 4, 128),
    "gemma-2-9b": Model(16, 8, 256),
    "gemma-4": Model(16, 4, 512),  # its global layers
    "wide-320": Model(16, 4, 320),  # no model: between the classes of head dims
    "smollm2-135m": Model(9, 3, 64),
    "smollm2-4-layers": Model(9, 3, 64),  # of its 30: a whole decoder for quick runs
    "vit-s": Model(6, 6, 64, causal=False),
    "vit-b": Model(12, 12, 64, causal=False),
    "vit-l": Model(16, 16, 64, causal=False),
    "t5-base": Model(12, 12, 64, causal=False, relative_bias=True),  # encoder
}

MILD = "5-5-4-4-4-4-3-3"  # 32 query heads over 8 KV heads
SKEWED = "9-7-5-4-3-2-1-1"  # as uneven as searches find them
HEAVY = "17-4-3-2-2-2-1-1"
MAPS = {
    "even": "the model's own: equal, contiguous groups",
    "groups-N": "equal, contiguous groups of N KV heads",
    "uneven-G": "mean group size G (2, 3, 4, 6), heads placed by chance, as AsymGQA finds them",
    "N-N-...": "contiguous groups of the sizes given",
    "giant": "as many KV heads as the model; all but one have one query head, the last the rest",
    "interleaved": "equal groups whose members are scattered over the heads",
    "pruned": "the model's own with a quarter of the query heads taken out by chance",
    "tp-N": "rank 0's part when the query heads are cut over N devices",
}


def head_map(name: str, model: Model) -> HeadMap:
    """The map of a name in ``MAPS``."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    chance = random.Random(0)  # the same maps on every machine
    even = HeadMap.uniform(heads, kv_heads)
    if name == "even":
        return even
    if name == "giant":
        return HeadMap.from_group_sizes([1] * (kv_heads - 1) + [heads - kv_heads + 1])
    if name == "interleaved":
        return HeadMap(chance.sample(even.entries, heads), kv_heads)
    if name == "pruned":
        kept = sorted(chance.sample(range(heads), heads - heads // 4))
        return HeadMap((even[h] for h in kept), kv_heads)
    if match := re.fullmatch(r"groups-(\d+)", name):
        return HeadMap.uniform(heads, int(match[1]))
    if match := re.fullmatch(r"uneven-(\d+)", name):
        groups = max(1, round(heads / int(match[1])))
        weights = [chance.random() ** 2 for _ in range(groups)]
        more = chance.choices(range(groups), weights, k=heads - groups)
        return HeadMap(chance.sample([*range(groups), *more], heads), groups)
    if match := re.fullmatch(r"tp-(\d+)", name):
        return even.shard(0, int(match[1])).head_map
    if re.fullmatch(r"\d+(-\d+)+", name):
        sizes = [int(size) for size in name.split("-")]
        if sum(sizes) != heads:
            raise ValueError(f"map {name} must have {heads} query heads, got {sum(sizes)}")
        return HeadMap.from_group_sizes(sizes)
    raise ValueError(f"map must be one of {', '.join(MAPS)}, got {name!r}")
