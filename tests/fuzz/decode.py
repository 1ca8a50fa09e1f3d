"""Decode over caches, plans, and appends."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gqa_kernels import PagedKVCache, asym_gqa_decode, plan_decode
from gqa_kernels.testing import assert_close

from .attention import QUERY_COUNTS, maps, options_of_sequence
from .caches import CACHE_NAMES, draw_cache, value_heads_by_key
from .draw import DTYPES, Call, Draw, with_ranges
from .memory import storage_bytes
from .new_tokens import check_append, draw_new
from .oracle import Sequence, check_attention


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
        if draw.chance(0.2):
            arguments["key_ranges"] = draw.key_ranges(batch, num_heads, q_len, capacity)
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
    written = [*memories, cache.lengths] if new is not None else []
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
    capacity = place.table.shape[2] * place.k.shape[2]
    value_by = value_heads_by_key(heads, place.v.shape[1])
    sequences, turned = [], []
    for b, q in enumerate(queries):
        appended = counts[b] if new is not None else 0
        k, v, lengths = place.sequence(b, appended, value_by)
        positions = (int(place.lengths[b, 0]) + torch.arange(counts[b])).expand(q.shape[:2])
        mask = with_ranges(arguments.get("attn_mask"), arguments.get("key_ranges"), capacity)
        if mask is not None:
            mask = mask.expand(batch, *q.shape[:2], capacity)[b, ..., : k.shape[1]]
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
