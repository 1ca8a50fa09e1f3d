"""Decode over caches of every kind, plans, and appends, on memory laid out here."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_kernels import DenseKVCache, PagedKVCache, asym_gqa_decode, plan_decode
from gqa_kernels.testing import assert_close

from .attention import QUERY_COUNTS, maps, options_of_sequence
from .draw import DTYPES, Call, Draw
from .formats import STORED, Stored, largest_step, row_scale, stored, values
from .memory import storage_bytes
from .oracle import Sequence, check_attention

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
        """Values of some slots of a head, fp64 or as stored where there is no format."""
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
    scope = draw.pick("number", "one", "head", "token", "token")
    zeros = format.integer and draw.chance(0.5)
    for side, x in (("k", k), ("v", v)):
        for name in ("scale", "zero") if zeros else ("scale",):
            shape = {"head": (x.shape[1],), "token": x.shape[:3]}.get(scope, (1,))
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
    batch, heads, pages = place.table.shape
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


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rows ``[..., D]`` with their first R columns rotated, for tables ``[..., R / 2]``."""
    width = 2 * cos.shape[-1]
    if interleaved:
        a, b = x[..., 0:width:2], x[..., 1:width:2]
    else:
        a, b = x[..., : width // 2], x[..., width // 2 : width]
    first, second = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([first, second], -1).flatten(-2)
    if not interleaved:
        turned = torch.cat([first, second], -1)
    return torch.cat([turned, x[..., width:]], -1)


@dataclass
class New:
    """New tokens of a call: ``k[b] [Hk, n, D]``, ``v[b]``, and their rotary tables if any."""

    k: list[Tensor]
    v: list[Tensor]
    counts: list[int]
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False

    def turn(self, x: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``[H, n, D]`` of tokens at ``positions [H, n]`` rotated, computed in ``dtype``."""
        if self.cos is None:
            return x.to(dtype)
        position = positions.clamp(max=self.cos.shape[0] - 1)
        tables = (table.to(dtype)[position] for table in (self.cos, self.sin))
        return rotated(x.to(dtype), *tables, self.interleaved)


def check_append(place: Place, new: New, value_heads: list[int]) -> None:
    """The new tokens lie in their slots, in the cache's format."""
    for b, count in enumerate(new.counts):
        for side, rows in (("k", new.k[b]), ("v", new.v[b])):
            for head in range(rows.shape[0]):
                by = head if side == "k" else value_heads[head]
                first = int(place.lengths[b, by])
                page, slot = place.slots(b, by, first, first + count)
                if count:
                    _check_rows(place, new, side, head, rows[head], page, slot, first)


def _check_rows(place: Place, new: New, side, head, rows, page, slot, first) -> None:
    turned = side == "k" and new.cos is not None
    positions = torch.arange(first, first + len(rows))
    exact = new.turn(rows, positions, torch.float64) if side == "k" else rows.double()
    memory = {"k": place.k, "v": place.v}[side][page, head, slot]
    what = f"appended {side} of head {head}"
    if place.format is None:
        if not turned:
            assert torch.equal(memory, rows), f"{what}: other bits"
        else:
            eager = new.turn(rows, positions, torch.float32).to(rows.dtype)
            assert_close(what, memory, exact, [eager])
        return
    scale, zero = place.row_scales(side, head, page, slot)
    own = f"{side}_scale" in place.scales and torch.is_tensor(place.scales[f"{side}_scale"])
    own = own and place.scales[f"{side}_scale"].dim() == 3
    if own:
        expected_scale, expected_zero = row_scale(exact.float(), place.format, zero is not None)
        torch.testing.assert_close(scale, expected_scale, rtol=0 if not turned else 1e-5, atol=0)
        if zero is not None and not turned:
            assert torch.equal(zero, expected_zero), f"{what}: other zeros"
    if not turned:
        expected = stored(rows, place.format, scale, zero)
        same = torch.equal(memory.view(torch.uint8), expected.view(torch.uint8))
        assert same, f"{what}: other stored numbers"
    elif own:
        error = (values(memory, place.format, scale, zero) - exact).abs()
        allowed = largest_step(exact, place.format, scale, zero) * 1.01 + 1e-6
        assert (error <= allowed).all(), f"{what}: error {float((error - allowed).max()):.2e}"


def draw_new(draw: Draw, place: Place, counts: list[int], dtype: torch.dtype, rotary: bool) -> New:
    def tokens(heads: int, dim: int) -> list[Tensor]:
        return [draw.normal(heads, n, dim, dtype=dtype, size=2.0) for n in counts]

    per_byte = 1 if place.format is None else place.format.per_byte
    dims = [x.shape[3] * per_byte for x in (place.k, place.v)]
    new = New(tokens(place.k.shape[1], dims[0]), tokens(place.v.shape[1], dims[1]), counts)
    if rotary and dims[0] >= 2:
        half = draw.integer(1, dims[0] // 2)
        positions = int(place.lengths.max()) + max(counts, default=0) + 1
        angle = draw.normal(positions, half, size=3.0)
        table = draw.pick(torch.float32, dtype)
        new.cos, new.sin = (draw.place(x.to(table)) for x in (angle.cos(), angle.sin()))
        if draw.chance(0.5):  # rows of a table that is wider than what is used
            new.cos, new.sin = new.cos.contiguous(), new.sin.contiguous()
        new.interleaved = draw.chance(0.5)
    return new


def draw_decode(draw: Draw) -> Call:
    """Decode, planned or not, with new tokens or without; or an append alone."""
    appends = draw.chance(0.5)
    packed = draw.chance(0.25)
    value_heads = draw.integer(1, 5) if draw.chance(0.25) else None
    dtype = draw.pick(*DTYPES)
    q_len = draw.pick(*QUERY_COUNTS)
    (make, made_of), place = draw_cache(draw, q_len if appends else 0, value_heads, dtype)
    batch, heads = place.lengths.shape
    counts = [draw.integer(0, q_len) for _ in range(batch)] if packed else [q_len] * batch
    per_head = made_of.get("lengths", torch.zeros(1)).dim() == 2
    rotary = appends and draw.chance(0.4) and not per_head
    new = draw_new(draw, place, counts, dtype, rotary) if appends else None
    num_heads = draw.head_count()
    value_count = place.v.shape[1]
    found = maps(draw, num_heads, heads, value_count if place.own_values else None)
    layout = "bhsd" if packed else draw.pick("bhsd", "bshd")
    dim = place.k.shape[3] * (place.format.per_byte if place.format else 1)
    queries = [draw.normal(num_heads, n, dim, dtype=dtype) for n in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)

    def given(parts: list[Tensor]) -> Tensor:
        """Tokens of each sequence, ``[H, n, D]``, as a call takes them."""
        if packed:
            return draw.place(torch.cat(parts, 1).transpose(0, 1))
        x = torch.stack(parts)
        return draw.place(x.transpose(1, 2) if layout == "bshd" else x)

    cache = make(**made_of)
    arguments = {
        "q": given(queries), "cache": cache, **found["given"], **draw.scoring(num_heads, batch),
        "causal": draw.chance(0.8), "return_lse": draw.chance(0.5),
        "backend": draw.pick("auto", "cpu", "cpu", "reference"),
    }  # fmt: skip
    if packed:
        arguments["cu_seqlens_q"] = draw.place(offsets.to(draw.pick(torch.int32, torch.int64)))
        arguments["max_seqlen_q"] = draw.pick(None, max(counts), max(counts) + 3)
    else:
        arguments["layout"] = layout
        capacity = place.table.shape[2] * place.k.shape[2]
        if draw.chance(0.2) and make is not PagedKVCache.from_csr:
            arguments["attn_mask"] = draw.mask((batch, num_heads, q_len, capacity), dtype)
    if new is not None:
        arguments |= {"k_new": given(new.k), "v_new": given(new.v), "advance": draw.chance(0.7)}
        if new.cos is not None:
            arguments |= {"rotary_cos": new.cos, "rotary_sin": new.sin,
                          "rotary_interleaved": new.interleaved}  # fmt: skip
    value_by = value_heads_by_key(heads, value_count)
    memories = [place.k, place.v, *(x for x in place.scales.values() if torch.is_tensor(x))]
    before = [storage_bytes(x) for x in memories]
    lengths_before = cache.lengths.clone()
    planned = draw.chance(0.3)

    def check(result: object) -> None:
        out, lse = result if arguments["return_lse"] else (result, None)
        if new is None:
            same = all(torch.equal(storage_bytes(x), y) for x, y in zip(memories, before))  # noqa: B905
            assert same, "the cache was modified"
        else:
            check_append(place, new, value_by)
        advanced = new is not None and arguments["advance"] and not planned
        expected = lengths_before
        if advanced:
            step = torch.tensor(counts)
            expected = expected + (step[:, None] if expected.dim() == 2 else step)
        assert torch.equal(cache.lengths, expected.to(cache.lengths.dtype)), "lengths"
        hold_decode(place, new, arguments, found, queries, out, lse, packed, layout)

    names = ("HeadMap", CACHE_NAMES.get(make, "PagedKVCache"), "asym_gqa_decode")
    written = memories + [cache.lengths] if new is not None else []
    if not planned:
        return Call(asym_gqa_decode, arguments, check, names, written)
    return Call(planned_decode, arguments, check, ("plan_decode", *names), written)


def planned_decode(
    q, cache, head_map, *, k_new=None, v_new=None, return_lse=False, advance=True,
    rotary_cos=None, rotary_sin=None, rotary_interleaved=False, **options,
):  # fmt: skip
    """A decode step through a plan, on a copy of the cache object over the same memory."""
    layer = copy.copy(cache)
    plan = plan_decode(q, cache, head_map, **options)
    return plan(
        q, layer, k_new, v_new, return_lse=return_lse, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
    )  # fmt: skip


def hold_decode(place, new, arguments, found, queries, out, lse, packed, layout) -> None:
    """Hold a decode's results to the oracle over what now lies in the cache."""
    batch, heads = place.lengths.shape
    counts = [x.shape[1] for x in queries]
    value_by = value_heads_by_key(heads, place.v.shape[1])
    sequences, turned = [], []
    for b, q in enumerate(queries):
        appended = counts[b] if new is not None else 0
        k, v, lengths = place.sequence(b, appended, value_by)
        positions = (int(place.lengths[b, 0]) + torch.arange(counts[b])).expand(q.shape[:2])
        mask = arguments.get("attn_mask")
        if mask is not None:
            mask = mask.expand(batch, *q.shape[:2], mask.shape[-1])[b]
            width = k.shape[1]
            mask = mask.expand(*q.shape[:2], -1)
            mask = mask.expand(*q.shape[:2], width) if mask.shape[-1] == 1 else mask[..., :width]
        q = q if new is None else new.turn(q, positions, torch.float32).to(q.dtype)
        turned.append(q)
        sequences.append(
            Sequence(
                q, k, v, found["key_map"], found["value_map"], lengths, mask=mask,
                **options_of_sequence(arguments, b),
            )
        )  # fmt: skip
    if packed:
        ends = torch.tensor(counts).cumsum(0).tolist()
        cut = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        outs = [out[part].transpose(0, 1) for part in cut]
        lses = None if lse is None else [lse[:, part] for part in cut]
    else:
        outs = list(out.transpose(1, 2) if layout == "bshd" else out)
        lses = None if lse is None else list(lse)
    check_attention(sequences, outs, lses)


def draw_append(draw: Draw) -> Call:
    """An append to a cache, without attention."""
    packed = draw.chance(0.4)
    dtype = draw.pick(*DTYPES)
    count = draw.pick(0, 1, 1, 2, 5, 17)
    (make, made_of), place = draw_cache(draw, count, None, dtype)
    batch = len(place.begin)
    counts = [draw.integer(0, count) for _ in range(batch)] if packed else [count] * batch
    per_head = made_of.get("lengths", torch.zeros(1)).dim() == 2
    new = draw_new(draw, place, counts, dtype, draw.chance(0.5) and not per_head)
    layout = "bhsd" if packed else draw.pick("bhsd", "bshd")
    queries = [draw.normal(3, n, new.k[0].shape[2], dtype=dtype) for n in counts]

    def given(parts: list[Tensor]) -> Tensor:
        if packed:
            return draw.place(torch.cat(parts, 1).transpose(0, 1))
        x = torch.stack(parts)
        return draw.place(x.transpose(1, 2) if layout == "bshd" else x)

    cache = make(**made_of)
    arguments = {
        "k_new": given(new.k), "v_new": given(new.v), "layout": layout,
        "backend": draw.pick("auto", "cpu", "cpu", "reference"), "advance": draw.chance(0.5),
    }  # fmt: skip
    if packed:
        offsets = torch.tensor([0, *counts]).cumsum(0)
        arguments |= {"cu_seqlens": draw.place(offsets), "max_seqlen": max(counts)}
    if new.cos is not None:
        arguments |= {"rotary_cos": new.cos, "rotary_sin": new.sin,
                      "rotary_interleaved": new.interleaved}  # fmt: skip
    if draw.chance(0.5):
        arguments["q"] = given(queries)
    before = cache.lengths.clone()

    def check(result: object) -> None:
        check_append(place, new, list(range(place.v.shape[1])))
        if arguments["advance"]:
            step = torch.tensor(counts)
            expected = before + (step[:, None] if before.dim() == 2 else step)
            assert torch.equal(cache.lengths, expected.to(before.dtype)), "lengths"
        if "q" not in arguments:
            assert result is None, "a result without queries"
            return
        for b, q in enumerate(queries):
            positions = (int(place.lengths[b, 0]) + torch.arange(counts[b])).expand(q.shape[:2])
            exact = new.turn(q, positions, torch.float64)
            end = sum(counts[: b + 1])
            part = result[end - counts[b] : end] if packed else result[b]
            part = part.transpose(0, 1) if packed or layout == "bshd" else part
            eager = new.turn(q, positions, torch.float32).to(dtype)
            assert_close("rotated q", part, exact, [eager])

    memories = [place.k, place.v, *(x for x in place.scales.values() if torch.is_tensor(x))]
    names = (CACHE_NAMES.get(make, "PagedKVCache"),)
    return Call(cache.append, arguments, check, names, [*memories, cache.lengths])
