"""Cases as data: shapes of real models, head maps over their heads, and the suites made of them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from gqa_kernels import HeadMap

from .roofline import Work, append_work, attention_work


@dataclass(frozen=True)
class Model:
    """Attention of one layer: query heads, KV heads as published, head dim, causal or not."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True


MODELS = {
    "llama-2-7b": Model(32, 32, 128),
    "opt-1.3b": Model(32, 32, 64),
    "llama-3-8b": Model(32, 8, 128),
    "llama-3.2-1b": Model(32, 8, 64),
    "llama-3-70b": Model(64, 8, 128),
    "qwen2.5-7b": Model(28, 4, 128),
    "gemma-2-9b": Model(16, 8, 256),
    "smollm2-135m": Model(9, 3, 64),
    "vit-b": Model(12, 12, 64, causal=False),
}

SKEWED = "9-7-5-4-3-2-1-1"  # 32 query heads over 8 KV heads, as uneven as searches find them
MILD = "5-5-4-4-4-4-3-3"
MAPS = {
    "even": "the model's own: equal, contiguous groups",
    "uneven-G": "mean group size G (2, 3, 4, 6), heads placed by chance, as AsymGQA finds them",
    "N-N-...": "contiguous groups of the sizes given",
    "giant": "as many KV heads as the model; all but one have one query head, the last the rest",
    "interleaved": "equal groups whose members are scattered over the heads",
    "pruned": "the model's own with a quarter of the query heads taken out by chance",
    "tp-N": "rank 0's part when the query heads are cut over N devices",
}


def head_map(name: str, model: Model) -> HeadMap:
    """The map that a name out of ``MAPS`` stands for."""
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


@dataclass(frozen=True)
class CacheKind:
    """Memory of a cache: pages of so many tokens (0: dense) and its format (None: the queries')."""

    page_size: int = 0
    format: str | None = None

    @classmethod
    def parse(cls, text: str) -> CacheKind:
        """``dense`` or ``pagesN``, then a format behind a dash, if any: ``pages16-int8``."""
        match = re.fullmatch(r"(?:dense|pages(\d+))(?:-(fp8_e4m3|fp8_e5m2|int8|int4))?", text)
        if not match:
            raise ValueError(f"cache must be like dense or pages16-int8, got {text!r}")
        return cls(int(match[1] or 0), match[2])

    @property
    def storage(self) -> dict[str, float]:
        """Bytes of a stored number and of a row's scale, as the roofline's functions take them."""
        if self.format is None:
            return {}
        return {"kv_itemsize": 0.5 if self.format == "int4" else 1, "row_scale_bytes": 4}


@dataclass(frozen=True)
class Case:
    """One attention call.

    Attributes:
        op: name out of ``benchmarks.ops.OPS``.
        q_len: query tokens; of ``generate``, tokens to generate after ``kv_len`` of a prompt.
        model: name out of ``MODELS``.
        map: name of a head map, see ``MAPS``.
        dtype: name of a torch type.
        window: tokens visible before a query's position, or None for all.
        cold: walk over input copies that together are larger than the last-level cache.
        cache: of ``decode-cache`` and ``append``, see :meth:`CacheKind.parse`.
    """

    op: str
    model: str
    map: str
    batch: int
    q_len: int
    kv_len: int
    dtype: str = "bfloat16"
    window: int | None = None
    cold: bool = False
    cache: str | None = None

    @property
    def key(self) -> str:
        """One line that names the case."""
        parts = [
            self.op, self.model, self.map, f"b{self.batch}", f"q{self.q_len}", f"k{self.kv_len}",
            self.dtype,
        ]  # fmt: skip
        parts += [f"w{self.window}"] if self.window is not None else []
        parts += [self.cache] if self.cache is not None else []
        return " ".join([*parts, "cold"] if self.cold else parts)

    @property
    def facts(self) -> dict:
        """What a row says of the case."""
        return {
            **asdict(self),
            "num_heads": self.head_map.num_heads,
            "num_kv_heads": self.head_map.num_kv_heads,
            "head_dim": self.head_dim,
            "group_sizes": list(self.head_map.group_sizes),
        }

    @cached_property
    def head_map(self) -> HeadMap:
        return head_map(self.map, MODELS[self.model])

    @property
    def head_dim(self) -> int:
        return MODELS[self.model].head_dim

    @property
    def causal(self) -> bool:
        """Whether a causal mask is needed: a single query, the last, sees all keys anyway."""
        return MODELS[self.model].causal and self.q_len > 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def options(self) -> dict:
        """Keyword arguments of the attention call."""
        options: dict = {"causal": True} if self.causal else {}
        if self.window is not None:
            options["window"] = (self.window, 0)
        return options

    @property
    def cache_kind(self) -> CacheKind:
        return CacheKind.parse(self.cache or "dense")

    @property
    def work(self) -> Work:
        itemsize, storage = self.torch_dtype.itemsize, self.cache_kind.storage
        if self.op == "append":
            tokens = self.batch * self.q_len
            return append_work(self.head_map, tokens, self.head_dim, itemsize, **storage)
        return attention_work(
            self.head_map, self.batch, self.q_len, self.kv_len, self.head_dim, itemsize, **storage,
            **self.options,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """That one call serves."""
        return self.batch * self.q_len

    @property
    def working_set(self) -> float:
        """Bytes that calls in a row go over: of one call, or more than any cache holds."""
        return math.inf if self.cold else self.work.bytes


def decode(
    model: str, maps: Iterable[str], batch: int, kv_len: int, *dtypes: str, **more
) -> list[Case]:
    """One new token per sequence, for every map and type (default bf16)."""
    return [
        Case("decode", model, name, batch, 1, kv_len, dtype, **more)
        for dtype in dtypes or ("bfloat16",)
        for name in maps
    ]


def prefill(
    model: str, maps: Iterable[str], batch: int, length: int, *dtypes: str, **more
) -> list[Case]:
    """A whole prompt (or image), for every map and type (default bf16)."""
    return [
        Case("prefill", model, name, batch, length, length, dtype, **more)
        for dtype in dtypes or ("bfloat16",)
        for name in maps
    ]


def backward(
    model: str, maps: Iterable[str], batch: int, length: int, *dtypes: str, **more
) -> list[Case]:
    """Gradients of a whole sequence, for every map and type (default bf16)."""
    return [
        replace(case, op="backward")
        for case in prefill(model, maps, batch, length, *dtypes, **more)
    ]


def over_caches(
    model: str, maps: Iterable[str], batch: int, kv_len: int, *caches: str, **more
) -> list[Case]:
    """One new token per sequence over each kind of cache, and its append, in bf16."""
    return [
        Case(op, model, name, batch, 1, kv_len, cache=cache, **more)
        for op in CACHE_OPS
        for cache in caches
        for name in maps
    ]


def end_to_end(
    model: str, maps: Iterable[str], batch: int, prompt: int, new_tokens: int, dtype: str
) -> list[Case]:
    """Time to the first token after a prompt, and the tokens after it."""
    return [
        Case(op, model, name, batch, q_len, prompt, dtype)
        for op, q_len in (("first-token", prompt), ("generate", new_tokens))
        for name in maps
    ]


BOTH = ("even", SKEWED)
GROUP_SIZES = ("uneven-2", "uneven-3", "uneven-4", "uneven-6")
BF16, FP16, FP32 = "bfloat16", "float16", "float32"

QUICK = [
    *decode("llama-3-8b", BOTH, 1, 256, BF16, FP32),
    *decode("llama-3-8b", BOTH, 1, 4096, BF16, FP32),
    *decode("llama-2-7b", ("uneven-4",), 1, 1024, BF16),
    *decode("smollm2-135m", ("even", "4-3-2"), 4, 1024, FP32),
    *prefill("llama-3-8b", BOTH, 1, 256, BF16, FP32),
    *prefill("smollm2-135m", ("even", "4-3-2"), 1, 512, FP32),
    *prefill("vit-b", ("uneven-3",), 2, 197, FP32),
    *backward("smollm2-135m", ("even", "4-3-2"), 1, 256, FP32),
]

CPU = [
    # Bandwidth versus context; at 8192 also the other types and a batch.
    *(c for n in (128, 512, 1024, 4096) for c in decode("llama-3-8b", BOTH, 1, n)),
    *decode("llama-3-8b", BOTH, 1, 1024, FP16, FP32),
    *decode("llama-3-8b", BOTH, 1, 8192, BF16, FP16, FP32),
    *decode("llama-3-8b", BOTH, 8, 8192, BF16),
    # Skew at a constant number of KV heads, and scattered, pruned and cut maps.
    *decode("llama-3-8b", (MILD, "giant", "interleaved", "pruned", "tp-3"), 1, 4096),
    *decode("qwen2.5-7b", ("even", "tp-3"), 1, 4096),
    # Speed-up versus group size, on the models that AsymGQA converts.
    *decode("llama-2-7b", ("even", *GROUP_SIZES), 1, 4096),
    *decode("opt-1.3b", ("uneven-4",), 4, 2048),
    *decode("smollm2-135m", ("even", "4-3-2"), 1, 2048, BF16, FP32),
    *decode("llama-3-8b", BOTH, 1, 512, cold=True),
    *prefill("llama-3-8b", BOTH, 1, 128),
    *prefill("llama-3-8b", BOTH, 1, 1024, BF16, FP16, FP32),
    *prefill("llama-3-8b", BOTH, 1, 4096, BF16),
    *prefill("llama-3-8b", ("giant", "interleaved", "pruned"), 1, 1024),
    *prefill("opt-1.3b", ("even", "uneven-4"), 1, 1024, FP32),
    *prefill("llama-2-7b", GROUP_SIZES, 1, 1024),
    *prefill("smollm2-135m", ("even", "4-3-2"), 1, 1024, FP32),
    *prefill("vit-b", ("even", "uneven-3"), 8, 197, FP32),
    *backward("llama-3-8b", BOTH, 1, 1024, BF16, FP32),
    *backward("llama-3.2-1b", BOTH, 1, 1024, BF16, FP32),
    *backward("vit-b", ("even", "uneven-3"), 8, 197, FP32),
    *end_to_end("smollm2-135m", ("even", "4-3-2"), 1, 1024, 8, FP32),
]

CACHE_OPS = ("decode-cache", "append")
CACHE_KINDS = ("pages16", "pages64", "dense-fp8_e4m3", "dense-int8", "dense-int4", "pages16-int8")
CACHES = [
    *over_caches("llama-3-8b", BOTH, 1, 8192, *CACHE_KINDS),
    *over_caches("llama-3-8b", (SKEWED,), 8, 8192, *CACHE_KINDS),
]

CPU_GOALS = [  # what the CPU backend is held to: slow, about a quarter of an hour
    *(c for n in (128, 1024, 8192) for c in decode("llama-3-8b", BOTH, 1, n, FP32, FP16, BF16)),
    *decode("llama-3-8b", BOTH, 8, 8192, FP32, FP16, BF16),
    *(c for n in (1024, 4096) for c in prefill("llama-3-8b", BOTH, 1, n, FP32, FP16, BF16)),
    *(c for n in (1024, 4096) for c in prefill("llama-3.2-1b", BOTH, 1, n, FP32, FP16, BF16)),
]

GPU = [
    # The headline first: a session that runs out of time has measured what matters.
    *decode("llama-3-8b", BOTH, 1, 8192),
    *decode("llama-3-8b", BOTH, 32, 8192),
    *prefill("llama-3-8b", BOTH, 1, 16384),
    *prefill("llama-3-8b", BOTH, 1, 8192),
    *prefill("llama-3-8b", BOTH, 4, 2048),
    *prefill("llama-3.2-1b", BOTH, 1, 16384),
    *prefill("gemma-2-9b", ("even", "uneven-2"), 1, 16384),
    *(c for n in (512, 2048, 4096, 32768, 131072) for c in decode("llama-3-8b", BOTH, 1, n)),
    *(c for b in (4, 64) for c in decode("llama-3-8b", BOTH, b, 2048)),
    *decode("llama-3-70b", ("even", "uneven-6", "giant"), 16, 8192),
    *decode("llama-3-8b", (MILD, "giant", "interleaved", "pruned", "tp-3"), 16, 8192),
    *decode("llama-2-7b", ("even", *GROUP_SIZES), 16, 4096),
    *decode("qwen2.5-7b", ("even", "tp-3"), 16, 8192),
    *decode("opt-1.3b", ("uneven-4",), 16, 2048),
    *decode("llama-3-8b", BOTH, 16, 8192, FP16),
    *decode("smollm2-135m", ("even", "4-3-2"), 16, 2048),
    *prefill("llama-3-8b", BOTH, 1, 512),
    *prefill("llama-3-8b", ("giant", "interleaved", "pruned"), 4, 2048),
    *prefill("llama-3-8b", BOTH, 4, 2048, FP16),
    *prefill("llama-2-7b", GROUP_SIZES, 4, 2048),
    *prefill("opt-1.3b", ("even", "uneven-4"), 4, 2048),
    *prefill("vit-b", ("even", "uneven-3"), 64, 197),
    *prefill("llama-3-8b", BOTH, 1, 8192, window=1024),
    *backward("llama-3-8b", BOTH, 4, 2048),
    *backward("llama-3-8b", BOTH, 1, 8192),
    *end_to_end("llama-3-8b", BOTH, 4, 4096, 8, BF16),
    *over_caches("llama-3-8b", (SKEWED,), 32, 8192, *CACHE_KINDS),
]

HEADLINE = "llama-3-8b"  # the model, with the maps of BOTH and what follows, for the README
HEADLINE_TYPES = (BF16, FP32)
HEADLINE_LENGTHS = {"decode": (8192,), "prefill": (1024, 2048, 4096, 8192)}

Q_LENGTHS = {
    "decode": 1,
    "decode-cache": 1,
    "append": 1,
    "generate": 8,
}  # of own cases, unless given

SUITES: dict[str, list[Case]] = {
    "quick": QUICK,
    "cpu": CPU,
    "cpu-goals": CPU_GOALS,
    "caches": CACHES,
    "gpu": GPU,
}


def parse_shape(op: str, text: str) -> Case:
    """``MODEL:BATCH:KV_LEN[:Q_LEN]``; without Q_LEN the op's own, else KV_LEN."""
    match = re.fullmatch(r"([^:]+):(\d+):(\d+)(?::(\d+))?", text)
    if not match or match[1] not in MODELS:
        raise ValueError(
            f"shape must be MODEL:BATCH:KV_LEN[:Q_LEN] with a model out of {', '.join(MODELS)}, "
            f"got {text!r}"
        )
    kv_len = int(match[3])
    q_len = int(match[4] or Q_LENGTHS.get(op, kv_len))
    return Case(op, match[1], "even", int(match[2]), q_len, kv_len)


def vary(shapes: Iterable[Case], maps: Iterable[str], dtypes: Iterable[str]) -> list[Case]:
    """Every shape with every map and type."""
    return [replace(c, map=name, dtype=d) for c in shapes for d in dtypes for name in maps]
