"""Attention cases as data, and the functions that make them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from gqa_kernels import HeadMap

from ..measure.roofline import Work, append_work, attention_work
from .models import MODELS, head_map

CACHE_OPS = ("decode-cache", "append")
Q_LENGTHS = {"decode": 1, "decode-cache": 1, "append": 1, "generate": 8}  # unless given


@dataclass(frozen=True)
class CacheKind:
    """Memory of a cache: pages of so many tokens (0: dense) and its format (None: the queries').

    ``budgets``: each head has its own length and pages; the total number of tokens is the same.
    """

    page_size: int = 0
    format: str | None = None
    budgets: bool = False

    @classmethod
    def parse(cls, text: str) -> CacheKind:
        """``dense`` or ``pagesN``, then a format behind a dash, if any: ``pages16-int8``; or
        ``pagesN-budgets``."""
        budgets = re.fullmatch(r"pages(\d+)-budgets", text)
        if budgets:
            return cls(int(budgets[1]), None, True)
        match = re.fullmatch(r"(?:dense|pages(\d+))(?:-(fp8_e4m3|fp8_e5m2|int8|int4|k8v4))?", text)
        if not match:
            raise ValueError(f"cache must be like dense or pages16-int8, got {text!r}")
        return cls(int(match[1] or 0), match[2])

    @property
    def storage(self) -> dict[str, float]:
        """Bytes of a stored number and of a row's scale, as the roofline's functions take them."""
        if self.format is None:
            return {}
        itemsize = {"int4": 0.5, "k8v4": 0.75}.get(self.format, 1)  # of k8v4, if D == Dv
        return {"kv_itemsize": itemsize, "row_scale_bytes": 4}


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
        threads: torch's on the CPU, or None for as many as the run has.
        splits: parts that ``decode`` cuts the keys into, or None for the backend's own choice.
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
    threads: int | None = None
    splits: int | None = None

    @property
    def key(self) -> str:
        """One line that names the case."""
        parts = [
            self.op, self.model, self.map, f"b{self.batch}", f"q{self.q_len}", f"k{self.kv_len}",
            self.dtype,
        ]  # fmt: skip
        parts += [f"w{self.window}"] if self.window is not None else []
        parts += [self.cache] if self.cache is not None else []
        parts += [f"{self.threads} threads"] if self.threads is not None else []
        parts += [f"{self.splits} splits"] if self.splits is not None else []
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

    def check(self) -> None:
        """Raises ValueError where the map does not fit the model."""
        _ = self.head_map

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
    def relative_bias(self) -> bool:
        return MODELS[self.model].relative_bias

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def options(self) -> dict:
        """Keyword arguments of the attention call; tensors are the problem's."""
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
            self.head_map, self.batch, self.q_len, self.kv_len, self.head_dim, itemsize,
            bias_per_head=self.relative_bias, **storage, **self.options,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Query tokens of one call."""
        return self.batch * self.q_len

    @property
    def working_set(self) -> float:
        """Bytes that successive calls read: those of one call, or more than any cache holds."""
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
