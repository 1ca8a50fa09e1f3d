"""Caches with a history, of every kind, and the tokens that they must represent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gqa_kernels import DenseKVCache, HeadMap, PageAllocator, PagedKVCache
from gqa_kernels.cache.allocator import PageBatch
from gqa_kernels.cache.base import KVCache
from gqa_kernels.cache.formats import STORED_AS

GARBAGE_PAGE = 2147480000  # in page-table entries beyond a length


@dataclass
class Truth:
    """Tokens of each sequence as they were appended: ``k[b] [Hk, n, D]``, ``v[b] [Hv, n, Dv]``."""

    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def dense(self) -> tuple[Tensor, Tensor, list[int]]:
        """Padded ``[B, H, most, D]`` tensors and the lengths."""
        lengths = [x.shape[1] for x in self.k]
        most = max([1, *lengths])
        k, v = (
            torch.stack([torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in side])
            for side in (self.k, self.v)
        )
        return k, v, lengths


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        page_size: 0 for a dense cache.
        order: memory order of a page, ``"packed"`` for K and V in one tensor.
        format: of a quantised cache, with ``zeros`` or without.
        batch_index, begin: of a dense cache, and left padding of either.
    """

    page_size: int = 0
    order: str = "HND"
    format: str | None = None
    zeros: bool = False
    batch_index: bool = False
    begin: bool = False

    def __str__(self) -> str:
        words = [f"pages{self.page_size}-{self.order}" if self.page_size else "dense"]
        words += [self.format] if self.format else []
        words += [name for name in ("zeros", "batch_index", "begin") if getattr(self, name)]
        return "-".join(words)

    @property
    def caches(self) -> set[str]:
        """Names of the capabilities it takes."""
        needs = {"paged" if self.page_size or self.batch_index else "dense"}
        return needs | ({self.format} if self.format else set()) | (
            {"kv_begin"} if self.begin else set())  # fmt: skip


KINDS = [
    Kind(),
    Kind(batch_index=True),
    Kind(begin=True),
    Kind(1),
    Kind(3, "NHD"),
    Kind(16, "packed"),
    Kind(16, begin=True),
    Kind(64, "NHD"),
    Kind(256),
    Kind(format="fp8_e4m3"),
    Kind(16, format="fp8_e5m2"),
    Kind(3, "NHD", format="int8"),
    Kind(16, format="int8", zeros=True),
    Kind(16, format="int4"),
    Kind(batch_index=True, format="int4", zeros=True),
    Kind(16, format="k8v4"),
    Kind(3, "NHD", format="k8v4", zeros=True),
]


def poison(cache: KVCache) -> None:
    """NaN in every slot, and in every scale of its own."""
    for x in (cache.k, cache.v):
        x.view(torch.uint8).fill_(0x7F) if x.element_size() == 1 else x.fill_(torch.nan)
    for scale in cache.scales.values():
        if scale is not None:
            scale.fill_(torch.nan)


def empty_cache(
    kind: Kind, batch: int, capacity: int, head_map: HeadMap, dim: int, value_dim: int,
    dtype: torch.dtype, device: str, generator: torch.Generator, value_heads: int | None = None,
) -> KVCache:  # fmt: skip
    """A poisoned cache of ``batch`` sequences without tokens; pages in random order."""
    heads = head_map.num_kv_heads
    sizes = {"num_value_heads": value_heads, "value_head_dim": value_dim, "dtype": dtype,
             "device": device, "format": kind.format, "zeros": kind.zeros}  # fmt: skip
    begin = None
    if kind.begin:
        begin = torch.randint(0, 6, (batch,), generator=generator, dtype=torch.int32).to(device)
        capacity += 6
    if not kind.page_size:
        rows = batch + 2 if kind.batch_index else batch
        cache = DenseKVCache.empty(rows, heads, capacity, dim, **sizes)
        poison(cache)
        index = None
        if kind.batch_index:
            index = torch.randperm(rows, generator=generator)[:batch].to(device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        return DenseKVCache(
            cache.k, cache.v, lengths, batch_index=index, begin=begin, **cache.scales
        )
    max_pages = -(-capacity // kind.page_size)
    num_pages = batch * max_pages + 3
    table = torch.randperm(num_pages, generator=generator)[: batch * max_pages]
    table = table.view(batch, max_pages).to(device, torch.int32)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    if kind.order == "packed":
        kv = torch.full(
            (num_pages, 2, kind.page_size, heads, dim), torch.nan, dtype=dtype, device=device
        )
        return PagedKVCache.from_packed(kv, table, lengths, order="NHD", begin=begin)
    pool = PagedKVCache.empty(num_pages, kind.page_size, heads, dim, order=kind.order, **sizes)
    poison(pool)
    return pool.at(table, lengths, begin=begin)


def hide_unused_pages(cache: KVCache) -> None:
    """Garbage in the page-table entries that no token is in."""
    if isinstance(cache, PagedKVCache):
        page_size = cache.k.shape[2]
        end = cache.lengths + (0 if cache.begin is None else cache.begin)
        page = torch.arange(cache.page_table.shape[1], device=end.device)
        cache.page_table[page * page_size >= end[:, None]] = GARBAGE_PAGE


def fill(
    cache: KVCache, lengths: list[int], generator: torch.Generator, backend: str = "reference",
    dtype: torch.dtype = torch.float32, dims: tuple[int, int] | None = None,
) -> Truth:  # fmt: skip
    """Append random tokens in two packed goes until the sequences have ``lengths``."""
    view = cache.view()
    first = [n // 2 for n in lengths]
    no_k = torch.zeros(view.num_k_heads, 0, view.head_dim)
    no_v = torch.zeros(view.num_v_heads, 0, view.value_head_dim)
    truth = Truth([no_k] * len(lengths), [no_v] * len(lengths))
    for counts in (first, [n - m for n, m in zip(lengths, first, strict=True)]):
        offsets = torch.tensor([0, *counts]).cumsum(0)
        total = int(offsets[-1])
        k = torch.randn(total, view.num_k_heads, view.head_dim, generator=generator).to(dtype)
        v = torch.randn(total, view.num_v_heads, view.value_head_dim, generator=generator).to(dtype)
        cache.append(
            k.to(view.device), v.to(view.device), cu_seqlens=offsets.to(view.device),
            max_seqlen=max(counts), backend=backend,
        )  # fmt: skip
        for b in range(len(lengths)):
            part = slice(offsets[b], offsets[b + 1])
            truth.k[b] = torch.cat([truth.k[b], k[part].transpose(0, 1).float()], 1)
            truth.v[b] = torch.cat([truth.v[b], v[part].transpose(0, 1).float()], 1)
    return truth


def format_error(x: Tensor, side: str, kind: Kind) -> Tensor:
    """How far a stored number of K or V (side "k" or "v") may be from its value, ``[..., D]``."""
    if kind.format is None:
        return torch.zeros_like(x)
    found = STORED_AS[kind.format]["kv".index(side)]
    largest = x.abs().amax(-1, keepdim=True)
    if found.integer:
        span = largest / found.symmetric_high
        if kind.zeros:
            span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
            span = span / (found.high - found.low)
            span = span * 2  # the zero is rounded too, which may clamp by half a step more
        return (span / 2 * 1.001).expand_as(x)
    mantissa = 3 if found.name == "fp8_e4m3" else 2
    smallest = 2.0 ** (-6 - 3 if mantissa == 3 else -14 - 2)
    scale = largest / found.symmetric_high
    return x.abs() * 2.0 ** -(mantissa + 1) * 1.001 + scale * smallest


@dataclass
class History:
    """A pool after random allocations, appends, forks and frees; pages in random order.

    Attributes:
        tokens: of each sequence of the allocator, ``k [Hk, n, D]`` and ``v [Hv, n, Dv]``.
        place: page of the pool for each page of the allocator.
    """

    allocator: PageAllocator
    pool: PagedKVCache
    place: Tensor
    tokens: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def at(self, batch: PageBatch) -> PagedKVCache:
        """The sequences of a batch, pages copied where it asks for that."""
        copies = tuple(tuple(self.place[list(pair)].tolist()) for pair in batch.copies)
        table = self.place[batch.page_table.long()].to(torch.int32)
        return self.pool.at(PageBatch(table, batch.lengths, copies))


def random_history(
    seed: int, kind: Kind, backend: str, dtype: torch.dtype, device: str, steps: int = 12
) -> History:
    """Of a paged kind, appended to by a backend; some sequences have no token."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=generator))

    heads, dim = 2, 16
    allocator = PageAllocator(-(-400 // kind.page_size) + 12, kind.page_size)
    pool = PagedKVCache.empty(
        allocator.num_pages, kind.page_size, heads, dim, dtype=dtype, device=device,
        order=kind.order, format=kind.format, zeros=kind.zeros,
    )  # fmt: skip
    poison(pool)
    place = torch.randperm(allocator.num_pages, generator=generator)
    history = History(allocator, pool, place)
    tokens, empty = history.tokens, (torch.zeros(heads, 0, dim, dtype=dtype),) * 2
    for _ in range(steps):
        action = pick(5)
        if action == 0 or not tokens:
            tokens[allocator.allocate()] = empty
        elif action == 1:
            parent = allocator.sequences[pick(len(tokens))]
            length = pick(allocator.length(parent) + 1)
            child = allocator.fork(parent, length)
            tokens[child] = tuple(x[:, :length] for x in tokens[parent])
        elif action == 2 and len(tokens) > 2:
            name = allocator.sequences[pick(len(tokens))]
            allocator.free(name)
            del tokens[name]
        else:
            names = allocator.sequences[: 1 + pick(len(tokens))]
            count = 1 + pick(9)
            new = torch.randn(2, len(names), heads, count, dim, generator=generator).to(dtype)
            step = history.at(allocator.append(names, count))
            step.append(*new.to(device), backend=backend)
            for b, name in enumerate(names):
                tokens[name] = tuple(
                    torch.cat([old, x[b]], 1) for old, x in zip(tokens[name], new, strict=True)
                )
    tokens[allocator.allocate()] = empty
    return history
