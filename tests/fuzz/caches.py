"""Caches of every kind on memory laid out here, and what lies where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_kernels import DenseKVCache, PagedKVCache

from .draw import Draw
from .formats import STORED, Stored, values

GARBAGE = (0, -1, -(2**31), 2**31 - 1, 2147480000)  # page ids beyond a length
CACHE_NAMES = {DenseKVCache: "DenseKVCache", PagedKVCache: "PagedKVCache"}


@dataclass
class Place:
    """Where the keys of a drawn cache lie.

    Attributes:
        k, v: ``[P, H, page_size, D]`` views of the memory that the cache has.
        table: page of each sequence, head and page number, ``[B, Hk, max_pages]``.
        begin: first slot of each sequence, ``[B]``.
        lengths: keys of each sequence and key head before the call, ``[B, Hk]``.
        scales: by name, as the cache takes them.
        own_values: whether V has a head map of its own.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    begin: Tensor
    lengths: Tensor
    format: Stored | None
    scales: dict[str, object]
    dtype: torch.dtype
    own_values: bool

    def slots(self, b: int, head: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Page and slot in it of the keys ``[first, last)`` of a key head."""
        slot = int(self.begin[b]) + torch.arange(first, last)
        size = self.k.shape[2]
        return self.table[b, head, slot // size], slot % size

    def rows(self, side: str, head: int, page: Tensor, slot: Tensor) -> Tensor:
        """Values of some slots of a head, as stored where there is no format."""
        memory = {"k": self.k, "v": self.v}[side][page, head, slot]
        if self.format is None:
            return memory
        return values(memory, self.format, *self.row_scales(side, head, page, slot))

    def row_scales(self, side: str, head: int, page: Tensor, slot: Tensor):
        """Scale and zero of some slots, each ``[n]`` or None."""
        found = []
        for name in ("scale", "zero"):
            x = self.scales.get(f"{side}_{name}")
            if isinstance(x, float):
                x = torch.tensor(x)
            if x is None or x.dim() == 3:
                found.append(None if x is None else x[page, head, slot])
            elif x.dim() == 2:
                found.append(x[page, head])
            else:
                found.append((x[head] if x.numel() > 1 else x.reshape(())).expand(page.shape))
        return found

    def sequence(self, b: int, count: int, value_heads: list[int]) -> tuple[Tensor, Tensor, list]:
        """K, V and lengths of a sequence with ``count`` more keys than before the call.

        Args:
            value_heads: the key head by whose pages each value head is read.
        """
        lengths = (self.lengths[b] + count).tolist()
        most = max(lengths)

        def padded(side: str, head: int, by: int) -> Tensor:
            rows = self.rows(side, head, *self.slots(b, by, 0, lengths[by]))
            return torch.nn.functional.pad(rows, (0, 0, 0, most - len(rows)))

        k = torch.stack([padded("k", head, head) for head in range(len(lengths))])
        v = torch.stack([padded("v", head, by) for head, by in enumerate(value_heads)])
        return k, v, lengths


KINDS = ("dense", "dense", "index", "paged", "paged", "csr", "per head", "packed")


def draw_cache(
    draw: Draw, room: int, value_heads: int | None, dtype: torch.dtype, *,
    kind: tuple[str, ...] = KINDS, batch: int | None = None, heads: int | None = None,
    dims: tuple[int, int] | None = None, format: str | None = "any",
    lengths_per_head: bool | None = None,
) -> tuple[tuple, Place]:  # fmt: skip
    """A cache with random contents and room for some more tokens, and where they lie.

    Args:
        kind, batch, heads, dims, format, lengths_per_head: what is not left to chance.

    Returns:
        (constructor, its arguments), and the place.
    """
    kind = draw.pick(*kind)
    heads, batch = heads or draw.integer(1, 5), batch or draw.pick(1, 1, 2, 3)
    dim, value_dim = dims or draw.head_dims()
    if format == "any" and kind != "packed" and draw.chance(0.4):
        format = draw.pick(*STORED)
    format = STORED.get(format)
    if format and format.per_byte == 2:
        dim, value_dim = dim + dim % 2, value_dim + value_dim % 2
    if kind == "packed":
        value_dim, value_heads = dim, None
    if kind == "per head":
        value_heads = None
    values_heads = value_heads or heads
    lengths = draw.integers(0, draw.pick(3, 20, 90, 300), batch, 1).expand(batch, heads)
    if lengths_per_head is None:
        lengths_per_head = value_heads is None and draw.chance(0.3) and kind != "csr"
    if lengths_per_head:
        lengths = draw.integers(0, draw.pick(20, 90), batch, heads)
    lengths = lengths.clone()
    begin = torch.zeros(batch, dtype=torch.int64)
    if kind != "csr" and draw.chance(0.3):
        begin = draw.integers(0, 9, batch)
    most = max(1, int((lengths.amax(1) + begin).max()) + room)
    if kind in ("dense", "index"):
        size, pages, rows = most + draw.pick(0, 0, 5), 1, batch + (2 if kind == "index" else 0)
        order = torch.randperm(rows, generator=draw.generator)[:batch]
        table = (order if kind == "index" else torch.arange(batch))[:, None, None]
        table = table.expand(batch, heads, 1)
    else:
        size = draw.pick(1, 3, 16, 16, 64)
        pages = -(-most // size)
        rows_per_head = heads if kind == "per head" else 1
        rows = batch * rows_per_head * pages + draw.pick(0, 3)
        table = torch.randperm(rows, generator=draw.generator)[: batch * rows_per_head * pages]
        table = table.view(batch, rows_per_head, pages).expand(batch, heads, pages)
    k, v, scales = _storage(draw, kind, format, dtype, rows, size, (heads, dim),
                            (values_heads, value_dim))  # fmt: skip
    place = Place(k, v, table, begin, lengths, format, scales, dtype, value_heads is not None)
    _fill(draw, place, value_heads_by_key(heads, values_heads))
    return _cache_of(draw, kind, place, lengths_per_head, room), place


def value_heads_by_key(heads: int, value_heads: int) -> list[int]:
    """The key head whose pages and lengths hold for each value head; any, where counts differ."""
    return list(range(heads)) if heads == value_heads else [0] * value_heads


def _storage(draw: Draw, kind: str, format: Stored | None, dtype, rows, size, keys, values):
    """Poisoned memory, and scales."""
    stored_as = dtype if format is None else format.dtype
    bytes_per = 1 if format is None else format.per_byte

    def poison(heads: int, dim: int, *leading: int) -> Tensor:
        shape = (rows, *leading, heads, size, dim // bytes_per)
        x = torch.full(shape, 0xFF, dtype=torch.uint8)
        x = x.repeat_interleave(stored_as.itemsize, -1).view(stored_as)
        return draw.place(x, writable=True)

    if kind == "packed":
        kv = poison(*keys, 2)
        return kv[:, 0], kv[:, 1], {}
    k, v, scales = poison(*keys), poison(*values), {}
    if format is None:
        return k, v, scales
    sizes = {"fp8_e4m3": 0.5, "fp8_e5m2": 0.5, "int8": 0.02, "int4": 0.2}
    scope = draw.pick("number", "one", "head", "page", "token", "token")
    zeros = format.integer and draw.chance(0.5)
    for side, x in (("k", k), ("v", v)):
        for name in ("scale", "zero") if zeros else ("scale",):
            shapes = {"head": (x.shape[1],), "page": x.shape[:2], "token": x.shape[:3]}
            shape = shapes.get(scope, (1,))
            value = draw.normal(*shape).abs() * sizes[format.name] + 1e-3
            if name == "zero":
                value = draw.integers(0, 9, *shape).float()
            value = draw.place(value, writable=True)
            scales[f"{side}_{name}"] = float(value) if scope == "number" else value
    return k, v, scales


def _fill(draw: Draw, place: Place, value_heads: list[int]) -> None:
    """Random keys and values in the slots in use; poison stays in all others."""
    for b in range(len(place.begin)):
        for side, x in (("k", place.k), ("v", place.v)):
            for head in range(x.shape[1]):
                by = head if side == "k" else value_heads[head]
                page, slot = place.slots(b, by, 0, int(place.lengths[b, by]))
                shape = (len(page), x.shape[3])
                if place.format is None:
                    rows = draw.normal(*shape, dtype=place.dtype)
                elif place.format.integer:
                    low, high = (0, 255) if place.format.per_byte == 2 else (-128, 127)
                    rows = draw.integers(low, high, *shape).to(x.dtype)
                else:
                    rows = draw.normal(*shape).to(x.dtype)
                x[page, head, slot] = rows


def _cache_of(draw: Draw, kind: str, place: Place, lengths_per_head: bool, room: int):
    """The cache over that memory, through one of the constructors, with its arguments."""
    batch, _, pages = place.table.shape
    size, integers = place.k.shape[2], draw.pick(torch.int32, torch.int64)

    def ints(x: Tensor) -> Tensor:
        return draw.place(x.clone().to(integers), writable=True)

    lengths = ints(place.lengths if lengths_per_head else place.lengths[:, 0])
    shared = {"lengths": lengths, **place.scales}
    if place.begin.any():
        shared["begin"] = ints(place.begin)
    if kind in ("dense", "index"):
        layout = draw.pick("bhsd", "bshd")
        k, v = (x.transpose(1, 2) if layout == "bshd" else x for x in (place.k, place.v))
        if kind == "index":
            shared["batch_index"] = ints(place.table[:, 0, 0])
        return DenseKVCache, {"k": k, "v": v, "layout": layout, **shared}
    per_head = kind == "per head" or (kind == "paged" and not place.own_values and draw.chance(0.3))
    end = place.lengths + place.begin[:, None] + room
    end = end if per_head else end.amax(1, keepdim=True).expand_as(end)
    used = torch.arange(pages) * size < end[..., None]
    used |= torch.arange(pages) * size < 1 if kind == "csr" else False
    table = place.table.masked_fill(~used, draw.pick(*GARBAGE))
    order = draw.pick("HND", "NHD")
    k, v = (x.transpose(1, 2) if order == "NHD" else x for x in (place.k, place.v))
    if kind == "per head":
        return PagedKVCache, {"k": k, "v": v, "order": order, "page_table": ints(table), **shared}
    table = ints(table if per_head else table[:, 0])
    if kind == "csr" and not room:
        counts = -(-place.lengths[:, 0] // size)
        last = place.lengths[:, 0] - (counts - 1).clamp(min=0) * size
        indices = torch.cat([place.table[b, 0, : counts[b]] for b in range(batch)])
        arguments = {
            "k": k, "v": v, "order": order, **place.scales,
            "indptr": ints(torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])),
            "indices": ints(indices), "last_page_len": ints(last),
        }  # fmt: skip
        return PagedKVCache.from_csr, arguments
    if kind == "packed" and order == "HND":
        kv = torch.as_strided(
            place.k, (place.k.shape[0], 2, *place.k.shape[1:]),
            (place.k.stride(0), place.v.storage_offset() - place.k.storage_offset(),
             *place.k.stride()[1:]),
        )  # fmt: skip
        return PagedKVCache.from_packed, {"kv": kv, "page_table": table, **shared}
    return PagedKVCache, {"k": k, "v": v, "order": order, "page_table": table, **shared}
