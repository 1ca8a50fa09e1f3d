"""HeadSpace: the K or V heads of a layer with the moments that every criterion is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..head_map import HeadMap
from ..models.weights import LayerWeights, Rotary
from .symmetry import Symmetry

_WINDOW = 512  # tokens; distances between a query and the keys it sees
_WIDE = 2048  # inputs


class Moments(Protocol):
    """Moments of an attention input ``x [d]``, as ``calibrate`` collects them."""

    mean: Tensor  # [d], E[x]
    second_moment: Tensor  # [d, d], E[x x^T]


@dataclass(frozen=True)
class HeadSpace:
    """One side of a layer, in fp64.

    Attributes:
        side: ``"k"`` or ``"v"``.
        projections: ``[H, D, d (+ 1)]`` of the ``H`` KV heads; a bias is the last column. If an RMS
            norm follows, they are scaled to the same RMS, which doesn't change its output.
        rows: ``[H, D, d (+ 1)]`` what heads are compared by: the projections, times the weights of
            the norm if one follows.
        sigma: ``[d (+ 1), d (+ 1)]`` second moment of the input the rows are applied to, or None
            for the identity: heads compared by their weights. For K that is not rotated it is the
            covariance: what all keys of a head have in common adds the same to all scores of a
            query, and the softmax ignores it.
        head_map: the KV head that each query head reads.
        symmetry: the changes of basis that leave the attention as it is.
        metric: ``[Hq, D, D]``: an error ``e`` in what query head ``h`` reads costs
            ``e^T metric[h] e``: for K the squared error of its scores, for V of its output. It
            treats queries and keys as independent draws.
    """

    side: str
    projections: Tensor
    rows: Tensor
    sigma: Tensor | None
    head_map: HeadMap
    symmetry: Symmetry
    metric: Tensor

    @classmethod
    def of(
        cls,
        weights: LayerWeights,
        side: str,
        moments: Moments | None = None,
        query_moments: Moments | None = None,
    ) -> HeadSpace:
        """The space of a side.

        Args:
            moments: of the input of K and V; None compares by weights.
            query_moments: of the input of q, if it is another one (cross-attention).

        Raises:
            ValueError: weights or moments that are not finite, or a head whose K or V is zero.
        """
        projections = weights.rows(side).detach().double().cpu()
        if not projections.isfinite().all():
            raise ValueError(f"{side} weights must be finite, got NaN or inf")
        for head, rows in enumerate(projections):
            if not rows.any():
                raise ValueError(f"heads must not be zero, got zeros in {side} head {head}")
        head_map = weights.key_map if side == "k" else weights.value_map
        sigma = None if moments is None else _input_moment(weights, side, moments)
        rows = projections
        if side == "k" and weights.k_norm is not None:
            alike = normalised(projections, sigma)
            rows = alike * weights.k_norm.double().cpu()[:, None]
            projections = alike * (projections.norm() / alike.norm())
        query_moments = moments if query_moments is None else query_moments
        metric = _score_metric(weights, query_moments) if side == "k" else _output_metric(weights)
        symmetry = Symmetry.of(weights, side)
        return cls(side, projections, rows, sigma, head_map, symmetry, metric)

    @cached_property
    def cross(self) -> Tensor:
        """``[H, H, D, D]``: ``E[k_i k_j^T]`` of every pair of heads. Wide layers are multiplied in
        fp32, as their moments were."""
        H, D, width = self.rows.shape
        flat, sigma = self.rows.flatten(0, 1), self.sigma
        if width >= _WIDE:
            flat, sigma = flat.float(), None if sigma is None else sigma.float()
        left = flat if sigma is None else flat @ sigma
        return (left @ flat.T).double().view(H, D, H, D).transpose(1, 2)

    @cached_property
    def roots(self) -> dict[Any, tuple[Tensor, Tensor]]:
        """Roots of metrics that :mod:`.low_rank` has computed."""
        return {}

    @cached_property
    def energy(self) -> Tensor:
        """``[H]``: ``E|k_i|^2``."""
        return self.energy_of(self.rows)

    def energy_of(self, rows: Tensor) -> Tensor:
        """``E|k|^2`` of heads ``[n, D, d (+ 1)] -> [n]``."""
        return mean_energy(rows, self.sigma)


def _input_moment(weights: LayerWeights, side: str, moments: Moments) -> Tensor:
    """Second moment of ``[x; 1]`` (or ``x`` without bias) that errors of a side are weighed by."""
    mean, second = moments.mean.double().cpu(), moments.second_moment.double().cpu()
    if not (mean.isfinite().all() and second.isfinite().all()):
        raise ValueError("activations must be finite, got NaN or inf in their moments")
    biased = getattr(weights, f"{side}_bias") is not None
    if side == "k" and weights.rotary is None and weights.k_norm is None:
        second = second - torch.outer(mean, mean)
        if biased:
            second = torch.nn.functional.pad(second, (0, 1, 0, 1))
        return second
    return augmented(mean, second) if biased else second


def augmented(mean: Tensor, second: Tensor) -> Tensor:
    """``E[[x; 1] [x; 1]^T]``."""
    top = torch.cat([second, mean[:, None]], 1)
    return torch.cat([top, torch.cat([mean, mean.new_ones(1)])[None]], 0)


def mean_energy(rows: Tensor, sigma: Tensor | None) -> Tensor:
    moved = rows if sigma is None else rows @ sigma
    return (moved * rows).sum((1, 2))


def normalised(rows: Tensor, sigma: Tensor | None) -> Tensor:
    """Heads scaled to an RMS of 1 over their dims and all tokens: what an RMS norm does to each
    token, on average."""
    rms = (mean_energy(rows, sigma) / rows.shape[1]).sqrt().clamp(min=1e-300)
    return rows / rms[:, None, None]


def _output_metric(weights: LayerWeights) -> Tensor:
    """``o_h^T o_h`` of every query head."""
    o = weights.o.detach().double().cpu().transpose(0, 1)  # [Hq, d_out, Dv]
    return o.transpose(1, 2) @ o


def _score_metric(weights: LayerWeights, moments: Moments | None) -> Tensor:
    """Second moment of every query head, times the squared scale, over all relative rotations."""
    rows = weights.rows("q").detach().double().cpu()
    sigma = None
    if moments is not None:
        mean, sigma = moments.mean.double().cpu(), moments.second_moment.double().cpu()
        if weights.q_bias is not None:
            sigma = augmented(mean, sigma)
    if weights.q_norm is not None:
        rows = normalised(rows, sigma) * weights.q_norm.double().cpu()[:, None]
    moved = rows if sigma is None else rows @ sigma
    metric = moved @ rows.transpose(1, 2)
    scale = weights.scale if weights.scale is not None else 1 / math.sqrt(rows.shape[1])
    if weights.rotary is not None:
        metric = _turned(metric, weights.rotary)
    return metric * scale**2


def _turned(metric: Tensor, rotary: Rotary) -> Tensor:
    """Mean of ``R^T metric R`` over the rotations ``R`` by the distances 0 to ``_WINDOW - 1`` of a
    key to its query; if the frequencies are not known, over independent rotations of all planes.

    In the basis ``(x_a +- i x_b) / sqrt 2`` of each plane a rotation multiplies every coordinate by
    a phase, so the mean multiplies every entry of the metric by a number.
    """
    basis, factor = _turns(rotary, metric.shape[-1])
    turned = (basis @ metric.to(basis.dtype) @ basis.mH) * factor
    return (basis.mH @ turned @ basis).real


@lru_cache(maxsize=16)  # the layers of a model have one rotation
def _turns(rotary: Rotary, D: int) -> tuple[Tensor, Tensor]:
    """The basis ``[D, D]``, and the mean of every entry's phase in it."""
    half = rotary.dim // 2
    a, b = rotary.planes.T
    p = torch.arange(half)
    basis = torch.eye(D, dtype=torch.complex128)
    basis[: rotary.dim] = 0
    basis[p, a] = basis[half + p, a] = 0.5**0.5
    basis[p, b], basis[half + p, b] = 1j * 0.5**0.5, -1j * 0.5**0.5
    if rotary.frequencies is None:
        turns = torch.arange(rotary.dim)
        still = torch.full((D - rotary.dim,), -1)
        kind = torch.cat([turns, still])
        factor = (kind[:, None] == kind).to(basis.dtype)
    else:
        theta = torch.tensor(rotary.frequencies, dtype=torch.float64)
        speed = torch.cat([theta, -theta, theta.new_zeros(D - rotary.dim)])
        angles = torch.arange(_WINDOW)[:, None, None] * (speed[:, None] - speed)
        factor = torch.polar(torch.ones_like(angles), angles).mean(0)
    return basis, factor
