"""Merging: the K (or V) projection of a group, from the projections its query heads read before.

A method works on one group: the old KV heads its query heads read and how many read each. Some
methods also change the basis in which a query head reads; that is folded into its q or o.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..head_map import HeadMap
from ..models.weights import LayerWeights
from .alignment import rotations
from .low_rank import shared_head
from .space import HeadSpace, Moments

_SEED = 0  # of merging="random"
_TINY = 1e-300  # avoids a division by a mean of zero
_NEED_SPACE = ("medoid", "weighted", "aligned", "low_rank")


@dataclass(frozen=True)
class Group:
    """One new KV head to be made.

    Attributes:
        all_rows: ``[H, D, d (+ 1)]`` fp64, all old heads of the side.
        counts: ``[n]`` query heads of the group that read each.
        heads: ``[n]`` their numbers, in the order in which the group's query heads read them.
        query_heads: the group.
        space: moments of all heads of the side; None for methods that go without.
    """

    all_rows: Tensor
    counts: Tensor
    heads: list[int]
    query_heads: tuple[int, ...]
    space: HeadSpace | None

    @property
    def rows(self) -> Tensor:
        """``[n, D, d (+ 1)]`` fp64, the old heads."""
        return self.all_rows[self.heads]


class Merged(NamedTuple):
    """A group's new head.

    Attributes:
        rows: ``[D, d (+ 1)]``; None if they are still to be computed from the encoders.
        decoders: ``[n, D, D]``: readers of old head ``i`` read ``decoders[i]`` times the new head;
            None for the new head itself.
        encoders: ``[n, D, D]``: the new head is the sum of ``encoders[i]`` times old head ``i``;
            None if it is no function of the old heads.
    """

    rows: Tensor | None
    decoders: Tensor | None = None
    encoders: Tensor | None = None

    def rows_of(self, group: Group) -> Tensor:
        """``[D, d (+ 1)]``: the new head of a group."""
        if self.rows is not None:
            return self.rows
        assert self.encoders is not None
        return torch.einsum("nab,nbd->ad", self.encoders, group.rows)


def keep(group: Group) -> Merged:
    """Copy the old head; an error if the group reads several that differ."""
    if any(not torch.equal(rows, group.rows[0]) for rows in group.rows):
        raise ValueError(
            "maps must keep heads that differ apart with merging='none', got query heads "
            f"{list(group.query_heads)} of old KV heads {sorted(group.heads)} in one group"
        )
    return _chosen(group, 0)


def mean(group: Group) -> Merged:
    """Mean over the group's query heads (GQA, arXiv 2305.13245, section 2.1)."""
    return _averaged(group, group.counts)


def first(group: Group) -> Merged:
    """The old head of the group's first query head (GQA, same section)."""
    return _chosen(group, 0)


def random(group: Group) -> Merged:
    """A fresh head: normal entries of the old heads' spread (GQA, same section). The same for the
    same group."""
    generator = torch.Generator().manual_seed(_SEED + min(group.query_heads))
    noise = torch.randn(group.rows[0].shape, generator=generator, dtype=group.rows.dtype)
    return Merged(noise * group.rows.std())


def medoid(group: Group) -> Merged:
    """The old head nearest to the others, in what it computes on the calibration inputs."""
    cross = group.space.cross[group.heads][:, group.heads]
    energy = group.space.energy[group.heads]
    squared = energy[:, None] + energy - 2 * torch.einsum("ijaa->ij", cross)
    return _chosen(group, int((squared @ group.counts).argmin()))


def weighted(group: Group) -> Merged:
    """Mean weighted by how much each query head makes of what it reads: its mean squared query for
    K, its output weights for V.

    WGQA (arXiv 2407.10855) learns such weights by fine-tuning; these are the ones that minimise the
    squared error of scores or outputs if every direction of a head counts alike.
    """
    strength = torch.einsum("haa->h", group.space.metric)
    shares = torch.zeros(len(group.heads), dtype=group.rows.dtype)
    for h in group.query_heads:
        shares[group.heads.index(group.space.head_map[h])] += strength[h]
    return _averaged(group, shares)


def aligned(group: Group) -> Merged:
    """Mean of the heads turned onto each other (:mod:`.alignment`)."""
    R = rotations(group.space, group.heads, group.counts)
    shares = group.counts / group.counts.sum()
    encoders = shares[:, None, None] * R
    return Merged(None, R.transpose(1, 2), encoders)


def low_rank(group: Group) -> Merged:
    """The best head that all of the group can read through some matrix (:mod:`.low_rank`);
    ``aligned`` for K that an RMS norm follows, which allows rotations only."""
    if not group.space.symmetry.scalable:
        return aligned(group)
    found = shared_head(group.space, group.query_heads)
    decoders, encoders = (
        torch.stack([each[h] for h in group.heads]) for each in (found.decoders, found.encoders)
    )
    return Merged(None, decoders, encoders)


MERGING: dict[str, Callable[[Group], Merged]] = {
    "none": keep,
    "mean": mean,
    "first": first,
    "random": random,
    "medoid": medoid,
    "weighted": weighted,
    "aligned": aligned,
    "low_rank": low_rank,
}


def merge_layer(
    weights: LayerWeights,
    key_map: HeadMap,
    value_map: HeadMap,
    *,
    method: str,
    moments: Moments | None = None,
    query_moments: Moments | None = None,
    restore_norms: bool = False,
) -> LayerWeights:
    """The layer with the KV heads of new maps.

    A group whose query heads all read one old head gets its exact copy, whatever the method.

    Args:
        weights: the layer; it may have maps already.
        key_map, value_map: the new maps, ``Hq`` entries each; every KV head must have a reader.
        method: a name of ``MERGING``. ``"none"`` refuses to mix heads that differ: lossless.
        moments: of the input of K and V, as ``calibrate`` returns them. With them heads are
            compared by what they compute, otherwise by their weights.
        query_moments: of the input of q if it is another one (cross-attention).
        restore_norms: scale each merged head so that its mean square is that of the old heads its
            readers read. Without effect on K that an RMS norm follows.

    Returns:
        The child layer, in the dtypes of ``weights``. Its q and o differ from the parent's where
        the method changes the basis of a head.

    Raises:
        ValueError: no such method, a map that doesn't fit, a KV head without a reader, or one that
            the method refuses.

    Examples:
        >>> weights = layer_weights(attention_layers(model)[0])
        >>> child = merge_layer(weights, key_map, value_map, method="aligned", moments=stats[0])
    """
    check_merging(method)
    parent = weights
    for side, head_map in (("k", key_map), ("v", value_map)):
        space = None
        if _mixes(parent, side, head_map) and (restore_norms or method in _NEED_SPACE):
            space = HeadSpace.of(parent, side, moments, query_moments)
        old = weights.rows(side)
        rows, decoders = [], {}
        for group in _groups(parent, side, head_map, space):
            if len(group.heads) == 1:
                rows.append(old[group.heads[0]])
                continue
            merged = MERGING[method](group)
            scale = _norm_ratio(group, merged) if restore_norms else 1.0
            rows.append((scale * merged.rows_of(group)).to(old.dtype))
            if merged.decoders is not None:
                decoders |= _by_query_head(group, merged.decoders)
        weights = _fold(weights, side, decoders).with_rows(side, torch.stack(rows), head_map)
    return weights


def check_merging(method: str) -> None:
    """Raise ValueError unless there is such a method."""
    if method not in MERGING:
        raise ValueError(f"merging must be one of {', '.join(MERGING)}, got {method!r}")


def align_layer(
    weights: LayerWeights,
    key_map: HeadMap,
    value_map: HeadMap,
    *,
    moments: Moments | None = None,
    query_moments: Moments | None = None,
) -> LayerWeights:
    """The layer with its heads turned as ``merge_layer(method="aligned")`` turns them, not merged.

    It computes the same function; merging it with ``method="mean"`` is aligned merging. If several
    new groups read one old KV head, the layer has a copy for each of them.
    """
    parent = weights
    for side, head_map in (("k", key_map), ("v", value_map)):
        space = HeadSpace.of(parent, side, moments, query_moments)
        old = parent.rows(side).detach().double()
        rows, decoders, place = [], {}, {}
        for group in _groups(parent, side, head_map, space):
            R = rotations(space, group.heads, group.counts)
            decoders |= _by_query_head(group, R.transpose(1, 2))
            for h in group.query_heads:
                place[h] = len(rows) + group.heads.index(space.head_map[h])
            rows += list(R @ old[group.heads])
        aligned_map = HeadMap([place[h] for h in range(weights.num_heads)])
        weights = _fold(weights, side, decoders).with_rows(side, torch.stack(rows), aligned_map)
    return weights


def _mixes(weights: LayerWeights, side: str, head_map: HeadMap) -> bool:
    """Whether some group of a new map reads more than one old head."""
    old = weights.key_map if side == "k" else weights.value_map
    pairs = zip(head_map.entries, old.entries, strict=False)  # _groups refuses other lengths
    return len(set(pairs)) > len(set(head_map.entries))


def _groups(
    weights: LayerWeights, side: str, head_map: HeadMap, space: HeadSpace | None
) -> list[Group]:
    """The groups of a new map."""
    if head_map.num_heads != weights.num_heads:
        raise ValueError(
            f"maps must have {weights.num_heads} entries, one per query head, got "
            f"{head_map.num_heads}"
        )
    empty = [g for g, heads in enumerate(head_map.groups) if not heads]
    if empty:
        raise ValueError(f"maps must have a query head for every KV head, got none for {empty}")
    old = weights.key_map if side == "k" else weights.value_map
    rows = weights.rows(side).detach().double() if space is None else space.projections
    return [_group(rows, old, query_heads, space) for query_heads in head_map.groups]


def merge_group(space: HeadSpace, query_heads: Sequence[int], method: str) -> tuple[Group, Merged]:
    """One group of query heads on its own, and what a method makes of it."""
    group = _group(space.projections, space.head_map, tuple(query_heads), space)
    return group, MERGING[method](group)


def _group(
    rows: Tensor, old: HeadMap, query_heads: tuple[int, ...], space: HeadSpace | None
) -> Group:
    counts = Counter(old[h] for h in query_heads)
    heads = list(counts)
    shares = torch.tensor(list(counts.values()), dtype=torch.float64)
    return Group(rows, shares, heads, query_heads, space)


def _by_query_head(group: Group, decoders: Tensor) -> dict[int, Tensor]:
    """``{query head: [D, D]}`` of a group's decoders ``[n, D, D]``."""
    old = group.space.head_map
    return {h: decoders[group.heads.index(old[h])] for h in group.query_heads}


def _fold(weights: LayerWeights, side: str, decoders: dict[int, Tensor]) -> LayerWeights:
    """Fold the decoders of K or V into the q or o of the query heads that read them."""
    if not decoders:
        return weights
    if side == "k":
        rows = weights.rows("q").detach().clone()
        for h, decoder in decoders.items():
            rows[h] = (decoder.T.to(rows.device) @ rows[h].double()).to(rows.dtype)
        return weights.with_rows("q", rows)
    o = weights.o.detach().clone()
    for h, decoder in decoders.items():
        o[:, h] = (o[:, h].double() @ decoder.to(o.device)).to(o.dtype)
    return replace(weights, o=o)


def _averaged(group: Group, shares: Tensor) -> Merged:
    """Mean of a group's old heads with weights in proportion to ``shares [n]``."""
    shares = shares / shares.sum()
    rows = torch.einsum("n,n...->...", shares, group.rows)
    identity = torch.eye(group.rows.shape[1], dtype=rows.dtype)
    return Merged(rows, encoders=shares[:, None, None] * identity)


def _chosen(group: Group, index: int) -> Merged:
    """A copy of one of a group's old heads."""
    encoders = group.rows.new_zeros(len(group.heads), *[group.rows.shape[1]] * 2)
    encoders[index].fill_diagonal_(1)
    return Merged(group.rows[index], encoders=encoders)


def _norm_ratio(group: Group, merged: Merged) -> float:
    """Root mean square of what the group's query heads read before over what they read now."""
    shares = group.counts / group.counts.sum()
    rows = merged.rows_of(group)[None].expand_as(group.rows)
    if merged.decoders is not None:
        rows = merged.decoders @ rows
    before, after = group.space.energy_of(group.rows), group.space.energy_of(rows)
    return math.sqrt(float(before @ shares) / max(float(after @ shares), _TINY))
