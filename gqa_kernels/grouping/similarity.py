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

from ..models.families import attention_layers, layer_weights
from ..models.weights import LayerWeights
from .low_rank import GroupLosses
from .moments import LayerStats
from .space import HeadSpace, Moments

SIDES = ("k", "v", "shared")


@dataclass(frozen=True)
class Dissimilarity:
    """Distances between the query heads of a layer.

    Attributes:
        array: ``[Hq, Hq]`` fp64, symmetric, non-negative, zero diagonal.
        layer, side, kind: what it was made from.

    Examples:
        >>> D = similarity(model, stats, layer=0, side="k", kind="aligned")
        >>> D.array.shape
    """

    array: np.ndarray
    layer: int
    side: str
    kind: str


@dataclass(frozen=True)
class Kind:
    """One way to compare heads.

    Attributes:
        distances: ``distances(space, moments) -> [Hq, Hq]``, not yet symmetric to the last bit.
        uses_moments: False compares by weights alone.
        needs_moments: whether moments must be given.
    """

    distances: Callable[[HeadSpace, Moments | None], Tensor]
    uses_moments: bool = True
    needs_moments: bool = False


def cosine(space: HeadSpace, moments: Moments | None) -> Tensor:
    """1 - cosine of the heads, over all entries and tokens."""
    products = torch.einsum("ijaa->ij", space.cross)
    norms = space.energy.sqrt()
    return _by_query(space, 1 - products / (norms[:, None] * norms))


def position_cosine(space: HeadSpace, moments: LayerStats | None) -> Tensor:
    """1 - cosine of the heads' projections, averaged over the texts at each position.

    AsymGQA's measure (arXiv 2406.14963), before RoPE, here without padding. A projection is
    linear, so the mean input of each position is enough.
    """
    x = moments.position_mean[moments.position_count > 0].double().cpu()  # [P, d]
    if space.rows.shape[2] == x.shape[1] + 1:  # the bias column
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    heads = (space.rows @ x.T).flatten(1)
    heads = heads / heads.norm(dim=1, keepdim=True)
    return _by_query(space, 1 - heads @ heads.T)


def linear_cka(space: HeadSpace, moments: Moments | None) -> Tensor:
    """1 - linear CKA (Kornblith et al., arXiv 1905.00414): blind to any orthogonal change of basis
    and to scale. DHA's measure (arXiv 2406.06567)."""
    d = len(moments.mean)
    mean, rows = moments.mean.double().cpu(), space.rows[..., :d]
    covariance = moments.second_moment.double().cpu() - torch.outer(mean, mean)
    flat = rows.flatten(0, 1)
    H, D = space.rows.shape[:2]
    cross = (flat @ covariance @ flat.T).view(H, D, H, D)
    hsic = cross.square().sum((1, 3))
    scale = hsic.diagonal().sqrt()
    return _by_query(space, 1 - hsic / (scale[:, None] * scale))


def weight_sharing_error(space: HeadSpace, moments: Moments | None) -> Tensor:
    """Mean squared difference of the weights: the objective of a partition is then QCQA's
    weight-sharing error (arXiv 2406.10247), the squared error of each head against its group's
    mean."""
    products = torch.einsum("ijaa->ij", space.cross)
    squared = space.energy[:, None] + space.energy - 2 * products
    return _by_query(space, squared / space.rows[0].numel())


def aligned(space: HeadSpace, moments: Moments | None) -> Tensor:
    """Squared distance after the best allowed rotation, relative to twice the mean energy: the
    objective is the error of aligned merging if each pair could be aligned apart."""
    squared = space.energy[:, None] + space.energy - 2 * space.symmetry.overlap(space.cross)
    return _by_query(space, squared / (2 * space.energy.mean()))


def aligned_cosine(space: HeadSpace, moments: Moments | None) -> Tensor:
    """1 - cosine after the best allowed rotation ("Align before merge", arXiv 2412.20677)."""
    norms = space.energy.sqrt()
    overlap = space.symmetry.overlap(space.cross)
    return _by_query(space, 1 - overlap / (norms[:, None] * norms))


def functional(space: HeadSpace, moments: Moments | None) -> Tensor:
    """Squared error of the scores (K) or of the output (V) when one of two heads, turned onto the
    other, takes its place; relative to twice the mean square of scores or outputs."""
    return _functional(space, align=True)


def functional_raw(space: HeadSpace, moments: Moments | None) -> Tensor:
    """``functional`` without turning heads."""
    return _functional(space, align=False)


def low_rank(space: HeadSpace, moments: Moments | None) -> Tensor:
    """What the best shared head of a pair (:mod:`.low_rank`) leaves of the scores or outputs,
    relative to their mean square; ``functional`` for K that an RMS norm follows."""
    if not space.symmetry.scalable:
        return functional(space, moments)
    loss, heads = GroupLosses(space), range(len(space.head_map.entries))
    pairs = [[loss([min(i, j), max(i, j)]) if i != j else 0.0 for j in heads] for i in heads]
    return torch.tensor(pairs, dtype=torch.float64) / _mean_square(space)


KINDS: dict[str, Kind] = {
    "weight": Kind(cosine, uses_moments=False),
    "weight_sharing_error": Kind(weight_sharing_error, uses_moments=False),
    "activation": Kind(position_cosine, needs_moments=True),
    "activation_moment": Kind(cosine, needs_moments=True),
    "cka": Kind(linear_cka, needs_moments=True),
    "aligned": Kind(aligned),
    "aligned_cosine": Kind(aligned_cosine),
    "functional": Kind(functional, needs_moments=True),
    "functional_raw": Kind(functional_raw, needs_moments=True),
    "low_rank": Kind(low_rank, needs_moments=True),
}


def similarity(
    model: nn.Module,
    stats: Sequence[LayerStats] | None,
    layer: int,
    side: str = "shared",
    kind: str = "activation",
) -> Dissimilarity:
    """Distances between the query heads of a model's layer, by what they read.

    Args:
        model: a Hugging Face model of a known family.
        stats: what ``calibrate(model, ...)`` returned; None is enough for kinds that only need the
            weights: ``"weight"``, ``"weight_sharing_error"``, ``"aligned"``,
            ``"aligned_cosine"``.
        layer: index of the attention layer.
        side: ``"k"``, ``"v"``, or ``"shared"``, the mean of the two.
        kind: a name of ``KINDS``.

    Raises:
        ValueError: a bad side, kind or layer, no stats, stats that are not finite, or a head whose
            K or V is zero.

    Examples:
        >>> D = similarity(model, stats, layer=0, side="k", kind="aligned")
        >>> found = search(D, num_groups=4)
    """
    _check(side, kind, stats)
    layers = attention_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must lie in [0, {len(layers)}), got {layer}")
    moments = None if stats is None else stats[layer]
    try:
        weights = layer_weights(layers[layer])
        query_moments = None if moments is None else moments.query
        array = layer_similarity(weights, moments, side, kind, query_moments)
    except ValueError as error:
        raise ValueError(f"{error} (layer {layer})") from error
    return Dissimilarity(array, layer, side, kind)


def layer_similarity(
    weights: LayerWeights,
    moments: Moments | None,
    side: str = "shared",
    kind: str = "activation",
    query_moments: Moments | None = None,
) -> np.ndarray:
    """``similarity`` of one layer's weights: ``[Hq, Hq]`` fp64.

    ``query_moments`` are those of the input of q, if it is another one (cross-attention).
    """
    _check(side, kind, moments)
    chosen = KINDS[kind]
    total = 0
    sides = ("k", "v") if side == "shared" else (side,)
    for each in sides:
        given = (moments, query_moments) if chosen.uses_moments else (None, None)
        space = HeadSpace.of(weights, each, *given)
        distances = chosen.distances(space, moments).clamp(min=0)
        if not distances.isfinite().all():
            raise ValueError(f"heads must not be zero on the calibration inputs, got a {each} head")
        distances = (distances + distances.T) / 2
        same = torch.tensor(space.head_map.entries)
        distances[same[:, None] == same] = 0
        total = total + distances
    return (total / len(sides)).numpy().copy()


def check_kind(kind: str) -> None:
    """Raise ValueError unless there is such a kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _check(side: str, kind: str, moments: object) -> None:
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    check_kind(kind)
    if KINDS[kind].needs_moments and moments is None:
        raise ValueError(f"stats must be given for kind={kind!r}, got None")


def _by_query(space: HeadSpace, distances: Tensor) -> Tensor:
    """``[Hkv, Hkv]`` distances of KV heads as ``[Hq, Hq]`` of the query heads that read them."""
    heads = list(space.head_map.entries)
    return distances[heads][:, heads]


def _functional(space: HeadSpace, align: bool) -> Tensor:
    heads = list(space.head_map.entries)
    cross = space.cross
    own = torch.einsum("iiab->iab", cross)
    errors = torch.empty(len(heads), len(own), dtype=torch.float64)
    for i in range(len(own)):  # one head at a time: [H, D, D] are in memory, not [H, H, D, D]
        towards, others = cross[i], own
        if align:
            R = space.symmetry.nearest(cross[i])
            towards, others = towards @ R.transpose(1, 2), R @ own @ R.transpose(1, 2)
        error = own[i] - towards - towards.transpose(1, 2) + others  # E[(k_i - R k_j) (...)^T]
        readers = [h for h, head in enumerate(heads) if head == i]
        if readers:
            errors[readers] = torch.einsum("hab,jab->hj", space.metric[readers], error)
    errors = errors[:, heads]
    return (errors + errors.T) / (4 * _mean_square(space))


def _mean_square(space: HeadSpace) -> Tensor:
    """Mean over the query heads of the mean square of scores or outputs."""
    own = torch.einsum("iiab->iab", space.cross)[list(space.head_map.entries)]
    return torch.einsum("hab,hab->h", space.metric, own).mean()
