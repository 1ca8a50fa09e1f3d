"""Which changes of basis of a head's K or V leave the attention's output as it is.

V: any invertible ``A``; ``A v`` is undone by ``o A^-1``. K: ``A k`` is undone by ``A^-T q``, if
``A`` commutes with what stands between the projection and the product: with rotary embedding
only a rotation (and scaling) inside each plane does; with an RMS norm of each head only orthogonal
matrices do, and only where its weights are the same for all the dims they mix.

A ``Symmetry`` splits the ``D`` dims into blocks of three kinds and finds, inside each, the best
orthogonal matrix for a pair of heads (Procrustes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.weights import LayerWeights


@dataclass(frozen=True)
class Symmetry:
    """The orthogonal changes of basis allowed, as blocks of dims.

    Attributes:
        dim: ``D``.
        planes: ``[P, 2]`` pairs of dims that may turn as a plane: a rotation, no reflection.
        signed: ``[N, 2]`` pairs of dims that may only be negated, both together.
        sets: index tensors ``[n]``; the dims of one may be mixed by any orthogonal matrix (of one
            dim: its sign).
        scalable: whether other invertible matrices of the same blocks are allowed as well.
    """

    dim: int
    planes: Tensor
    signed: Tensor
    sets: tuple[Tensor, ...]
    scalable: bool

    @classmethod
    def of(cls, weights: LayerWeights, side: str) -> Symmetry:
        """The symmetry of ``"k"`` or ``"v"``."""
        none = torch.zeros(0, 2, dtype=torch.long)
        D = getattr(weights, side).shape[1]
        if side == "v":
            return cls(D, none, none, (torch.arange(D),), True)
        rotary = weights.rotary
        planes = none if rotary is None else rotary.planes
        rest = torch.arange(0 if rotary is None else rotary.dim, D)
        norms = [n.double().cpu() for n in (weights.q_norm, weights.k_norm) if n is not None]
        if not norms:
            return cls(D, planes, none, (rest,) if len(rest) else (), True)
        weight = torch.stack(norms, 1)  # [D, 1 or 2]
        even = (weight[planes[:, 0]] == weight[planes[:, 1]]).all(1)
        _, kind = torch.unique(weight[rest], dim=0, return_inverse=True)
        sets = tuple(rest[kind == k] for k in range(int(kind.max()) + 1 if len(rest) else 0))
        return cls(D, planes[even], planes[~even], sets, False)

    def overlap(self, C: Tensor) -> Tensor:
        """``max_R tr(R^T C)`` over the allowed ``R``: ``[..., D, D] -> [...]``.

        With ``C = E[a b^T]`` it is ``E[a . R b]`` for the ``R`` that turns ``b`` onto ``a`` best.
        """
        alpha, beta = plane_parts(C, self.planes)
        total = torch.hypot(alpha, beta).sum(-1)
        total = total + plane_parts(C, self.signed)[0].abs().sum(-1)
        for dims in self.sets:
            block = C[..., dims[:, None], dims]
            total = total + torch.linalg.svdvals(block).sum(-1)
        return total

    def nearest(self, C: Tensor) -> Tensor:
        """The ``R`` of ``overlap``: ``[..., D, D] -> [..., D, D]``, orthogonal."""
        R = torch.zeros_like(C)
        alpha, beta = plane_parts(C, self.planes)
        angle = torch.atan2(beta, alpha)
        _set_planes(R, self.planes, angle.cos(), angle.sin())
        sign = torch.where(plane_parts(C, self.signed)[0] < 0, -1.0, 1.0).to(C.dtype)
        _set_planes(R, self.signed, sign, torch.zeros_like(sign))
        for dims in self.sets:
            U, _, Vh = torch.linalg.svd(C[..., dims[:, None], dims])
            R[..., dims[:, None], dims] = U @ Vh
        return R


def plane_parts(C: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., P]`` twice: ``tr(R^T C)`` on a plane is ``alpha cos + beta sin`` of R's angle."""
    a, b = planes.to(C.device).T
    return C[..., a, a] + C[..., b, b], C[..., b, a] - C[..., a, b]


def _set_planes(R: Tensor, planes: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = planes.T
    R[..., a, a], R[..., b, b] = cos, cos
    R[..., b, a], R[..., a, b] = sin, -sin
