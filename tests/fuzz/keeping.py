"""``cache.keep`` of random keys: the memory afterwards, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from .caches import CACHE_NAMES, Place, draw_cache, value_heads_by_key
from .draw import DTYPES, Call, Draw


def draw_keep(draw: Draw) -> Call:
    """Positions or a mask, the same for all heads or not, over a cache of any kind."""
    value_heads = draw.pick(None, None, None, draw.integer(1, 4))
    (make, made_of), place = draw_cache(draw, 0, value_heads, draw.pick(*DTYPES))
    heads = place.k.shape[1]
    other_values = place.v.shape[1] != heads
    per_head = made_of.get("lengths", torch.zeros(1)).dim() == 2
    shared = other_values or (not per_head and draw.chance(0.4))
    lengths = place.lengths[:, :1] if shared else place.lengths
    rows = [[_positions(draw, int(length)) for length in row] for row in lengths]
    counts = torch.tensor([[len(row) for row in of_sequence] for of_sequence in rows])
    as_mask = draw.chance(0.4)
    columns = int(lengths.max()) if as_mask else int(counts.max()) + draw.pick(0, 0, 3)
    kept = torch.zeros(*lengths.shape, columns, dtype=torch.bool)
    if not as_mask:
        kept = draw.integers(-(2**31), 2**31 - 1, *lengths.shape, columns)
    for b, of_sequence in enumerate(rows):
        for h, row in enumerate(of_sequence):
            if as_mask:
                kept[b, h, row] = True
            else:
                kept[b, h, : len(row)] = row
    cache = make(**made_of)
    arguments: dict[str, object] = {"backend": draw.pick("auto", "cpu", "cpu", "reference")}
    integers = draw.pick(torch.int32, torch.int64)
    kept = kept if as_mask else kept.to(integers)
    arguments["kept"] = draw.place(kept[:, 0] if shared else kept)
    if not as_mask and (counts != columns).any():
        given = counts[:, 0] if shared else counts
        arguments["lengths"] = draw.place(given.to(draw.pick(torch.int32, torch.int64)))
    expected = _moved(place, rows if not shared else [row * heads for row in rows])
    before = cache.lengths

    def check(result: object) -> None:
        assert result is None
        for name, (memory, wanted) in expected.items():
            same = torch.equal(memory.contiguous().view(torch.uint8),
                               wanted.contiguous().view(torch.uint8))  # fmt: skip
            assert same, f"{name} holds other bits"
        wanted = counts[:, 0] if shared else counts
        assert torch.equal(cache.lengths.long(), wanted), "lengths"
        assert before.data_ptr() != cache.lengths.data_ptr() or not before.numel()

    memories = [place.k, place.v, *(x for x in place.scales.values() if torch.is_tensor(x))]
    names = (CACHE_NAMES.get(make, "PagedKVCache"),)
    return Call(cache.keep, arguments, check, names, memories)


def _positions(draw: Draw, length: int) -> Tensor:
    """Ascending; none, all, or a random part."""
    count = draw.pick(0, length, draw.integer(0, length))
    return torch.randperm(length, generator=draw.generator)[:count].sort().values


def _moved(place: Place, rows: list[list[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each memory, and a copy in which key ``rows[b][h][i]`` has become key ``i``."""
    found = {}
    by_key = value_heads_by_key(place.k.shape[1], place.v.shape[1])
    for side in "kv":
        data = {"k": place.k, "v": place.v}[side]
        per_row = [
            name
            for name in (f"{side}_scale", f"{side}_zero")
            if torch.is_tensor(place.scales.get(name)) and place.scales[name].dim() == 3
        ]
        memories = {side: data, **{name: place.scales[name] for name in per_row}}  # fmt: skip
        copies = {name: x.clone() for name, x in memories.items()}
        for b, of_sequence in enumerate(rows):
            for head in range(data.shape[1]):
                by = head if side == "k" else by_key[head]
                kept = of_sequence[by]
                page, slot = place.slots(b, by, 0, int(place.lengths[b, by]))
                to = page[: len(kept)], slot[: len(kept)]
                for name, x in memories.items():
                    copies[name][to[0], head, to[1]] = x[page[kept], head, slot[kept]].clone()
        found |= {name: (x, copies[name]) for name, x in memories.items()}
    return found
