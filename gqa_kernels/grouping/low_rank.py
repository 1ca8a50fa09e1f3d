"""The best shared head of a group: what its query heads read is a linear function of it.

Aligned merging lets query head ``h`` read ``R_h^T m`` with ``R_h`` orthogonal and ``m`` the mean of
the turned heads. If any invertible matrix is allowed in place of ``R_h^T`` (:mod:`.symmetry`),
the ``m [D]`` and the decoders ``T_h`` that minimise ``sum_h E[e_h^T M_h e_h]``,
``e_h = k_h - T_h m``, are known in closed form: with ``B_h^T B_h = M_h``, ``m`` holds the ``D``
leading principal components of the stacked ``B_h k_h`` (Eckart and Young). Under rotary embedding
each plane is one complex number and keeps its leading complex component; what the metric says
across planes is left out. The decoders are folded into q and o.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .space import HeadSpace
from .symmetry import plane_parts

_ITERATED = 512  # rows of a matrix whose eigenvectors are iterated
_ROUNDS, _SPARE = 4, 16  # of the iteration; vectors besides those that are needed
_RIDGE = 1e-6  # share of a metric's mean eigenvalue added to it, so that it can be inverted


class SharedHead(NamedTuple):
    """What the query heads of a group read.

    Attributes:
        decoders: ``{old KV head: [D, D]}``: its readers now read ``decoders[old] m``.
        encoders: ``{old KV head: [D, D]}``: the shared head ``m`` is the sum of ``encoders[old]``
            times the old heads.
    """

    decoders: dict[int, Tensor]
    encoders: dict[int, Tensor]


def shared_head(space: HeadSpace, query_heads: Sequence[int]) -> SharedHead:
    """The best shared head of some query heads; ``space.symmetry.scalable`` must hold."""
    old, metric = _readers(space, query_heads)
    D = space.symmetry.dim
    decoders = torch.zeros(len(old), D, D, dtype=metric.dtype)
    encoders = torch.zeros_like(decoders)
    for dims in space.symmetry.sets:
        roots, inverses = _roots_of(space, old, query_heads, metric, dims)
        vectors = _components(space, old, roots, dims)
        decoder, encoder = inverses @ vectors, vectors.transpose(1, 2) @ roots  # [n, r, r] each
        # m and its decoders are free up to a change of basis: scale the decoders to one
        scale = _symmetric_power((decoder.transpose(1, 2) @ decoder).mean(0), 0.5)
        encoders[:, dims[:, None], dims] = scale @ encoder
        decoders[:, dims[:, None], dims] = decoder @ torch.linalg.inv(scale)
    planes = space.symmetry.planes
    if len(planes):
        roots = _plane_roots(metric, planes)
        gram = _plane_gram(space.cross[old][:, old], roots, planes)
        vectors = torch.linalg.eigh(gram)[1][..., -1].T  # [n, P]
        decoder, encoder = vectors / roots, vectors.conj() * roots  # [n, P] each
        scale = decoder.abs().square().mean(0).sqrt()
        a, b = planes.T
        for matrices, factor in ((encoders, scale * encoder), (decoders, decoder / scale)):
            matrices[:, a, a] = matrices[:, b, b] = factor.real
            matrices[:, b, a], matrices[:, a, b] = factor.imag, -factor.imag
    return SharedHead(*(dict(zip(old, each, strict=True)) for each in (decoders, encoders)))


class GroupLosses:
    """``losses(query_heads)``: what the best shared head of a group leaves of its scores or
    outputs, ``sum_h E[e_h^T M_h e_h]``; a cost for ``search_groups``.

    Two query heads that read one old head count as two, each with its own metric; that gives the
    same components as the sum of their metrics.
    """

    def __init__(self, space: HeadSpace):
        if not space.symmetry.scalable:
            raise ValueError("space must allow scaling, got K heads that an RMS norm follows")
        heads = list(space.head_map.entries)
        cross = space.cross[heads][:, heads]  # [Hq, Hq, D, D]
        self._sets = []  # of each set of dims [Hq, r, Hq, r]
        for dims in space.symmetry.sets:
            roots, _ = _roots(space.metric, dims)
            gram = roots[:, None] @ cross[..., dims[:, None], dims] @ roots
            self._sets.append(gram.transpose(1, 2))
        self._planes = None  # [P, Hq, Hq]
        planes = space.symmetry.planes
        if len(planes):
            roots = _plane_roots(space.metric, planes)
            self._planes = _plane_gram(cross, roots, planes)
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, query_heads: Sequence[int]) -> float:
        heads = tuple(query_heads)
        if heads not in self._known:
            self._known[heads] = self._loss(list(heads))
        return self._known[heads]

    def _loss(self, heads: list[int]) -> float:
        if len(heads) == 1:
            return 0.0
        total = 0.0
        for gram in self._sets:
            r = gram.shape[1]
            part = gram[heads][:, :, heads].reshape(len(heads) * r, -1)
            total += float(torch.linalg.eigvalsh(part)[:-r].clamp(min=0).sum())
        if self._planes is not None:
            values = torch.linalg.eigvalsh(self._planes[:, heads][:, :, heads])
            total += float(values[:, :-1].clamp(min=0).sum())
        return total


def pair_estimates(space: HeadSpace) -> Tensor:
    """``[Hq, Hq]``: near ``GroupLosses`` of every two query heads up to one factor, without
    eigenvalues; 0 if they read one old head.

    Of a rotated plane they are exact. Of other dims, as if the weighted heads' products ``C_ij``
    had spectra of one shape: a two by two matrix of their norms represents them.
    """
    heads = list(space.head_map.entries)
    cross = space.cross[heads][:, heads]
    total = torch.zeros(len(heads), len(heads), dtype=cross.dtype)
    for dims in space.symmetry.sets:
        roots, _ = _roots(space.metric, dims)
        products = roots[:, None] @ cross[..., dims[:, None], dims] @ roots
        total += _smaller_eigenvalue(products.flatten(2).norm(dim=2))
    planes = space.symmetry.planes
    if len(planes):
        gram = _plane_gram(cross, _plane_roots(space.metric, planes), planes)
        total += _smaller_eigenvalue(gram.abs()).sum(0)
    old = torch.tensor(heads)
    return total.masked_fill(old[:, None] == old, 0)


def _smaller_eigenvalue(products: Tensor) -> Tensor:
    """Of ``[[p_ii, p_ij], [p_ji, p_jj]]`` for all pairs of ``[..., n, n]`` products."""
    own = products.diagonal(dim1=-2, dim2=-1)
    a, b = own[..., :, None], own[..., None, :]
    return ((a + b) / 2 - (((a - b) / 2).square() + products.square()).sqrt()).clamp(min=0)


def _readers(space: HeadSpace, query_heads: Sequence[int]) -> tuple[list[int], Tensor]:
    """The old KV heads that some query heads read, and the sum ``[n, D, D]`` of their readers'
    metrics: the best decoder of an old head is the same for all of its readers."""
    counts = Counter(space.head_map[h] for h in query_heads)
    metric = torch.zeros(len(counts), *space.metric.shape[1:], dtype=space.metric.dtype)
    place = {head: i for i, head in enumerate(counts)}
    for h in query_heads:
        metric[place[space.head_map[h]]] += space.metric[h]
    return list(counts), metric


def _roots_of(
    space: HeadSpace, old: list[int], query_heads: Sequence[int], metric: Tensor, dims: Tensor
) -> tuple[Tensor, Tensor]:
    """``_roots`` of the old heads' metrics; each is computed once."""
    found = []
    for head, each in zip(old, metric, strict=True):
        readers = tuple(h for h in query_heads if space.head_map[h] == head)
        key = readers, int(dims[0])
        if key not in space.roots:
            space.roots[key] = tuple(root[0] for root in _roots(each[None], dims))
        found.append(space.roots[key])
    roots, inverses = zip(*found, strict=True)
    return torch.stack(roots), torch.stack(inverses)


def _roots(metric: Tensor, dims: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric roots of the metrics on some dims, and their inverses: ``[n, r, r]`` each."""
    block = metric[:, dims[:, None], dims]
    ridge = _RIDGE * torch.einsum("naa->n", block) / len(dims)
    block = block + ridge[:, None, None] * torch.eye(len(dims), dtype=block.dtype)
    return _symmetric_power(block, 0.5), _symmetric_power(block, -0.5)


def _components(space: HeadSpace, old: list[int], roots: Tensor, dims: Tensor) -> Tensor:
    """``[n, r, r]``: vectors of the ``r`` leading components of the stacked ``B_h k_h``."""
    n, r = len(old), len(dims)
    cross = space.cross[old][:, old][..., dims[:, None], dims]
    gram = roots[:, None] @ cross @ roots  # [n, n, r, r]; roots are symmetric
    return _leading(gram.transpose(1, 2).reshape(n * r, n * r), r).view(n, r, r)


def _leading(gram: Tensor, count: int) -> Tensor:
    """``[N, count]``: eigenvectors of a positive matrix with the largest eigenvalues.

    Of a large matrix by subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), which
    takes a fraction of the time. It keeps all but about a thousandth of what the exact ones keep.
    """
    if len(gram) < _ITERATED:
        return torch.linalg.eigh(gram)[1][:, len(gram) - count :]
    fast = gram.float()
    fast = fast / fast.diagonal().mean()
    start = torch.randn(len(gram), count + _SPARE, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(fast @ start.to(fast.device))[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(fast @ (fast @ basis))[0]
    basis = torch.linalg.qr(basis.double())[0]
    return basis @ torch.linalg.eigh(basis.T @ gram @ basis)[1][:, _SPARE:]


def _plane_roots(metric: Tensor, planes: Tensor) -> Tensor:
    """``[n, P]`` roots of the metrics' mean on each plane."""
    a, b = planes.T
    square = (metric[:, a, a] + metric[:, b, b]) / 2
    return (square + _RIDGE * square.mean(1, keepdim=True)).sqrt()


def _plane_gram(cross: Tensor, roots: Tensor, planes: Tensor) -> Tensor:
    """``[P, n, n]`` complex: products of the weighted heads of each plane."""
    alpha, beta = plane_parts(cross, planes)  # [n, n, P]
    return (torch.complex(alpha, beta) * roots[:, None] * roots).permute(2, 0, 1)


def _symmetric_power(matrix: Tensor, power: float) -> Tensor:
    """Power of symmetric positive definite matrices ``[..., r, r]``."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=1e-300)[..., None, :] ** power) @ vectors.transpose(-1, -2)
