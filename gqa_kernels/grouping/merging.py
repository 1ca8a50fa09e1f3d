"""Merging: the K (or V) projection of a group, from the projections its query heads read before.

A method takes ``blocks`` ``[Hkv, D, d]`` (rows of the old KV heads; a bias is a last column) and
``members``, for each new KV head the old KV heads that its query heads read, one entry per query
head: an old head that more query heads read weighs more. It returns ``[G, D, d]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Members = Sequence[Sequence[int]]


def keep(blocks: Tensor, members: Members) -> Tensor:
    """Copy the old KV head of each group; an error where a group reads several that differ."""
    for group, heads in enumerate(members):
        if any(not torch.equal(blocks[h], blocks[heads[0]]) for h in set(heads)):
            raise ValueError(
                f"maps must keep heads that differ apart with merging='none', got KV head {group} "
                f"with query heads of old KV heads {sorted(set(heads))}"
            )
    return blocks[[heads[0] for heads in members]]


def mean(blocks: Tensor, members: Members) -> Tensor:
    """Mean over the group's query heads (GQA, arXiv 2305.13245, section 2.1).

    Summed in fp64; a group that reads one old head gets its exact copy.
    """
    merged = []
    for heads in members:
        counts = Counter(heads)
        if len(counts) == 1:
            merged.append(blocks[heads[0]])
        else:
            shares = [count / len(heads) for count in counts.values()]
            total = sum(s * blocks[h].double() for h, s in zip(counts, shares, strict=True))
            merged.append(total.to(blocks.dtype))
    return torch.stack(merged)


MERGING: dict[str, Callable[[Tensor, Members], Tensor]] = {"none": keep, "mean": mean}


def merge(blocks: Tensor, members: Members, merging: str) -> Tensor:
    """Merge by the name of a method in ``MERGING``.

    Raises:
        ValueError: no such method, an empty group, or one that the method refuses.
    """
    if merging not in MERGING:
        raise ValueError(f"merging must be one of {', '.join(MERGING)}, got {merging!r}")
    empty = [group for group, heads in enumerate(members) if not heads]
    if empty:
        raise ValueError(f"maps must give every KV head a query head, got none for {empty}")
    return MERGING[merging](blocks, members)


def merge_layer(layer, key_map, value_map, *, method, moments=None, restore_norms=False):
    for side, new, old in (("k", key_map, layer.key_map), ("v", value_map, layer.value_map)):
        members = [[old[h] for h in group] for group in new.groups]
        rows = merge(layer.rows(side), members, method)
        w = rows if getattr(layer, side + "_bias") is None else rows[..., :-1]
        from dataclasses import replace
        ch = {side: w, ("key_map" if side == "k" else "value_map"): new}
        if w is not rows:
            ch[side + "_bias"] = rows[..., -1]
        layer = replace(layer, **ch)
    return layer
