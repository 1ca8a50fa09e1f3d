"""similarity(): how unlike two heads' keys or values are, from weights or from activations.

The items are the query heads, each with its own copy of the KV head it reads now: heads that share
one are at distance 0, so that models that are grouped already can be grouped further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..convert.families import AttentionLayer, attention_layers, head_blocks
from .calibration import LayerStats

SIDES = ("k", "v", "shared")


@dataclass(frozen=True)
class Dissimilarity:
    """Distances between the query heads of a layer.

    Attributes:
        array: ``[Hq, Hq]`` fp64, symmetric, non-negative, zero diagonal.
        layer, side, kind: what it was made from.
    """

    array: np.ndarray
    layer: int
    side: str
    kind: str


def weight_cosine(blocks: Tensor, stats: LayerStats | None) -> Tensor:
    """Cosine of the heads' projection weights. blocks: ``[Hkv, D, d]``."""
    return _cosine(blocks.flatten(1))


def activation_cosine(blocks: Tensor, stats: LayerStats | None) -> Tensor:
    """Cosine of the heads' projections, averaged over the texts at each position.

    AsymGQA's measure (arXiv 2406.14963), before RoPE, here without padding. A projection is
    linear, so the mean input of each position is enough.
    """
    if stats is None:
        raise ValueError("stats must be given for kind='activation', got None")
    x = stats.position_mean[stats.position_count > 0]  # [P, d]
    if blocks.shape[2] == x.shape[1] + 1:  # the bias column
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return _cosine((blocks @ x.T).flatten(1))


KINDS: dict[str, Callable[[Tensor, LayerStats | None], Tensor]] = {
    "weight": weight_cosine,
    "activation": activation_cosine,
}


def similarity(
    model: nn.Module,
    stats: Sequence[LayerStats] | None,
    layer: int,
    side: str = "shared",
    kind: str = "activation",
) -> Dissimilarity:
    """Distances ``1 - cosine`` between the query heads of a layer, by what they read.

    Args:
        model: a causal LM of a known family.
        stats: what ``calibrate(model, ...)`` returned; None will do for ``kind="weight"``.
        layer: index of the attention layer.
        side: ``"k"``, ``"v"``, or ``"shared"``, the mean of the two.
        kind: a name of ``KINDS``.

    Raises:
        ValueError: a bad side, kind or layer, no stats, or a head whose K or V is zero.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    layers = attention_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must lie in [0, {len(layers)}), got {layer}")
    sides = ("k", "v") if side == "shared" else (side,)
    layer_stats = None if stats is None else stats[layer]
    distances = [_distance(layers[layer], layer_stats, each, kind) for each in sides]
    return Dissimilarity(sum(distances) / len(distances), layer, side, kind)


def _distance(layer: AttentionLayer, stats: LayerStats | None, side: str, kind: str) -> np.ndarray:
    """``[Hq, Hq]`` distances of one side."""
    projection, head_map = {
        "k": (layer.key, layer.key_map),
        "v": (layer.value, layer.value_map),
    }[side]
    blocks = head_blocks(projection, layer.head_dim).double().cpu()
    cosine = KINDS[kind](blocks, stats)
    for head, value in enumerate(cosine.diagonal().tolist()):
        if value != value:
            raise ValueError(
                f"heads must not be zero or NaN, got {side} head {head} of layer {layer.index}"
            )
    distance = (1 - cosine).clamp(min=0)
    distance = (distance + distance.T) / 2
    distance.fill_diagonal_(0)
    heads = list(head_map.entries)
    return distance[heads][:, heads].numpy().copy()


def _cosine(rows: Tensor) -> Tensor:
    """``[H, H]`` cosines of the rows of ``[H, n]``; NaN for a row of zeros."""
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T
