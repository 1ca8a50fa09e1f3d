"""Attention of one sequence and its gradients, written apart from the package.

The exact result is fp64. The same formulas in the type of the inputs, with other orders of
summation and units, are eager torch as the tolerance rule of :mod:`gqa_kernels.testing` compares
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gqa_kernels.testing import assert_close

LOWEST = torch.finfo(torch.float32).min / 2  # additive mask values below hide a key


@dataclass(frozen=True)
class Precision:
    """How to compute.

    Attributes:
        scores: type of scores, softmax and sums over tokens.
        products: type of matrix products and their results.
        base2: scale the queries before the product, to scores in units of ln 2.
        shift: turn the head dims, in gradients also the queries, by so much: another order of
            summation.
        recomputed: gradients as kernels compute them that keep no P: P from the LSE, and the
            softmax's gradient from the rounded output.
        one_by_one: sum the products of a score in one accumulator, one after another.
    """

    scores: torch.dtype = torch.float64
    products: torch.dtype = torch.float64
    base2: bool = False
    shift: int = 0
    recomputed: bool = False
    one_by_one: bool = False

    def dot(self, q: Tensor, k: Tensor) -> Tensor:
        """Every query's product with every key."""
        if self.one_by_one:
            total = torch.zeros((), dtype=self.products)
            for i in range(q.shape[-1]):
                total = total + q[..., i, None] * k[..., None, :, i]
            return total
        return q @ k.transpose(-1, -2)

    @property
    def unit(self) -> float:
        """Of scores."""
        return math.log(2) if self.base2 else 1.0

    def order(self, dim: int) -> Tensor:
        order = torch.arange(dim).roll(self.shift)
        return torch.cat([order[::2], order[1::2]]) if self.shift % 2 else order


EXACT = Precision()
FEW_ORDERS, MANY_ORDERS = 4, 32


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def eager_forms(
    dtype: torch.dtype, dim: int, products: torch.dtype | None = None, most: int = 8
) -> list[Precision]:
    """Equivalent forms of eager torch for inputs of a type, with up to ``most`` orders."""
    found = [
        Precision(accumulated(dtype), products or dtype, base2, shift)
        for shift in range(min(most, dim))
        for base2 in (False, True)
    ]
    if most > FEW_ORDERS and (products or dtype) == torch.float32:
        found += [replace(form, one_by_one=True) for form in found[:4]]
    return found


def hold(
    name: str, actual: Tensor, exact: Tensor, eager: Callable[[int], list[Tensor]],
    factor: float = 2.0,
) -> None:  # fmt: skip
    """The tolerance rule, where ``eager`` computes forms with up to so many orders.

    Few orders are enough nearly always, and cheap. Of the thousands of calls that a fuzzer makes
    some have forms that are all good by luck: those are held to more of them.
    """
    try:
        assert_close(name, actual, exact, eager(FEW_ORDERS), factor)
    except AssertionError:
        assert_close(name, actual, exact, eager(MANY_ORDERS), factor)


@dataclass
class Sequence:
    """One sequence's call.

    Attributes:
        q: ``[Hq, Sq, D]``.
        k: ``[Hk, N, D]``, zeros beyond a head's length.
        v: ``[Hv, N, Dv]``.
        key_map, value_map: ``Hq`` integers.
        lengths: keys of each key head.
        window: (left, right), None for unbounded.
        mask: boolean or additive, broadcastable to ``[Hq, Sq, N]``.
        keep: of dropout, ``[Hq, Sq, N]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_map: list[int]
    value_map: list[int]
    lengths: list[int]
    causal: bool = False
    scale: float | None = None
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    keep: Tensor | None = None
    dropout_p: float = 0.0

    def _geometry(self) -> tuple[Tensor, Tensor]:
        """Key position minus query position, and which keys each query sees: ``[Hq, Sq, N]``."""
        n = torch.tensor([self.lengths[g] for g in self.key_map])[:, None, None]
        i = torch.arange(self.q.shape[1])[:, None] + n - self.q.shape[1]
        j = torch.arange(self.k.shape[1])
        distance, (left, right) = j - i, self.window
        visible = (j < n).expand(distance.shape)
        if self.causal:
            visible = visible & (distance <= 0)
        if left is not None:
            visible = visible & (distance >= -left)
        if right is not None:
            visible = visible & (distance <= right)
        if self.mask is not None:
            mask = self.mask
            visible = visible & (mask if mask.dtype == torch.bool else mask.double() >= LOWEST)
        return distance, visible

    def _scores(self, p: Precision) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores, ``tanh`` of the softcap, distances, visibility; scores are in ``p.unit``."""
        order = p.order(self.q.shape[2])
        scale = self.q.shape[2] ** -0.5 if self.scale is None else self.scale
        q, k = self.q.to(p.products)[..., order], self.k.to(p.products)[self.key_map][..., order]
        if p.base2:
            s = p.dot(q * (scale / p.unit), k).to(p.scores)
        else:
            s = p.dot(q, k).to(p.scores) * scale
        capped = None
        if self.softcap:
            cap = self.softcap / p.unit
            capped = torch.tanh(s / cap)
            s = cap * capped
        distance, visible = self._geometry()
        if self.slopes is not None:
            s = s - (self.slopes.to(p.scores) / p.unit)[:, None, None] * distance.abs()
        if self.mask is not None and self.mask.dtype != torch.bool:
            s = s + self.mask.to(p.scores) / p.unit
        return s.masked_fill(~visible, -math.inf), capped, distance, visible

    def _softmax(self, p: Precision, s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P, the LSE in ``p.unit`` and the sink's probability; zeros, -inf and 0 where nothing is
        seen."""
        sees = visible.any(-1)
        sink = torch.full(s.shape[:2], -math.inf, dtype=p.scores)
        if self.sinks is not None:
            sink = torch.where(sees, self.sinks.to(p.scores)[:, None] / p.unit, sink)
        exp, log = (torch.exp2, torch.log2) if p.base2 else (torch.exp, torch.log)
        top = sink if s.shape[-1] == 0 else torch.maximum(s.amax(-1), sink)
        top = top.masked_fill(~sees, 0.0)
        z = exp(s - top[..., None]).sum(-1) + exp(sink - top)
        z = z.masked_fill(~sees, 1.0)
        lse = (top + log(z)).masked_fill(~sees, -math.inf)
        probabilities = exp(s - top[..., None]) / z[..., None]
        return probabilities, lse, exp(sink - top) / z

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.keep is None else x * self.keep / (1 - self.dropout_p)

    def attend(self, p: Precision = EXACT) -> tuple[Tensor, Tensor]:
        """out ``[Hq, Sq, Dv]`` and LSE ``[Hq, Sq]``."""
        s, _, _, visible = self._scores(p)
        probabilities, lse, _ = self._softmax(p, s, visible)
        probabilities = self._dropped(probabilities)
        if p.products != torch.float64:  # P has the type of q
            probabilities = probabilities.to(self.q.dtype)
        out = probabilities.to(p.products) @ self.v.to(p.products)[self.value_map]
        return out.to(torch.float64 if p == EXACT else self.q.dtype), lse * p.unit

    def scores_of(self, p: Precision, queries: int) -> tuple[Tensor, Tensor]:
        """The largest score of each query head ``[Hq]``, and the probabilities that the last
        ``queries`` queries give to each key ``[Hk, N]``, before dropout."""
        s, _, _, visible = self._scores(p)
        probabilities, _, _ = self._softmax(p, s, visible)
        first = max(self.q.shape[1] - queries, 0)
        found = torch.zeros(self.k.shape[:2], dtype=p.scores)
        found.index_add_(0, torch.tensor(self.key_map), probabilities[:, first:].sum(1))
        top = s.flatten(1)
        most = top.amax(1) if top.shape[1] else torch.full(s.shape[:1], -math.inf, dtype=p.scores)
        return most * p.unit, found

    def gradients(self, p: Precision, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
        """Gradients of ``(out * dout).sum() + (lse * dlse).sum()`` by name."""
        order = p.order(self.q.shape[2])
        scale = self.q.shape[2] ** -0.5 if self.scale is None else self.scale
        s, capped, distance, visible = self._scores(p)
        probabilities, lse, sink = self._softmax(p, s, visible)
        if p.recomputed:
            out, _ = self.attend(replace(p, recomputed=False))
            lse = lse.masked_fill(lse == -math.inf, math.inf)[..., None]
            probabilities = (torch.exp2 if p.base2 else torch.exp)(s - lse)
        dout, dlse = dout.to(p.products), dlse.to(p.scores)
        v = self.v.to(p.products)[self.value_map]
        dropped = self._dropped(probabilities).to(p.products)
        tokens = p.order(self.q.shape[1])  # sums over these come in another order too
        dv = (dropped[:, tokens].transpose(1, 2) @ dout[:, tokens]).to(p.scores)
        value_order = p.order(v.shape[-1])
        dp = self._dropped(p.dot(dout[..., value_order], v[..., value_order]).to(p.scores))
        if p.recomputed:
            delta = (out.to(p.scores) * dout.to(p.scores)).sum(-1)
        else:
            delta = (probabilities * dp).sum(-1)
        ds = probabilities * (dp - delta[..., None] + dlse[..., None])
        found = {
            "alibi_slopes": -(ds * distance.abs()).sum((-1, -2)),
            "sinks": (sink * (dlse - delta)).sum(-1),
        }
        if self.softcap:
            ds = ds * (1 - capped**2)
        ds = ds.to(p.products)
        # Products in another order; the columns themselves stay where they are.
        columns = order.argsort()
        k = self.k.to(p.products)[self.key_map][..., order]
        q = self.q.to(p.products)[..., order]
        dq = scale * (ds @ k).to(p.scores)[..., columns]
        dk = scale * (ds[:, tokens].transpose(1, 2) @ q[:, tokens]).to(p.scores)[..., columns]
        found["q"] = dq
        for name, per_head, head_map, like in (
            ("k", dk, self.key_map, self.k),
            ("v", dv, self.value_map, self.v),
        ):
            total = torch.zeros(like.shape, dtype=p.scores)
            found[name] = total.index_add(0, torch.tensor(head_map), per_head)
        return found


def check_attention(
    sequences: list[Sequence], outs: Iterable[Tensor], lses: Iterable[Tensor] | None,
    exact_lse_inputs: bool = True,
) -> None:  # fmt: skip
    """Hold results of each sequence, ``[Hq, Sq, Dv]`` and ``[Hq, Sq]``, to the tolerance rule."""
    if not sequences:
        return
    dtype, dim = sequences[0].q.dtype, sequences[0].q.shape[2]

    def flat(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        out, lse = zip(*pairs, strict=True)
        return torch.cat([x.flatten() for x in out]), torch.cat([x.flatten() for x in lse])

    exact_out, exact_lse = flat(x.attend() for x in sequences)
    out = torch.cat([x.flatten() for x in outs])
    assert out.dtype == dtype, f"out: dtype {out.dtype}, expected {dtype}"

    def computed(which: int, products: torch.dtype | None) -> Callable[[int], list[Tensor]]:
        return lambda most: [
            flat(x.attend(form) for x in sequences)[which]
            for form in eager_forms(dtype, dim, products, most)
        ]

    hold("out", out, exact_out, computed(0, None))
    if lses is not None:
        lse, scores = torch.cat([x.flatten() for x in lses]), accumulated(dtype)
        assert lse.dtype == scores, f"lse: dtype {lse.dtype}, expected {scores}"
        hold("lse", lse, exact_lse, computed(1, scores))


def check_scores(
    sequences: list[Sequence], largest: Tensor | None, of_keys: Tensor | None, queries: int
) -> None:
    """Hold ``AuxOutput``'s largest scores ``[B, Hq]`` and scores of keys ``[B, Hk, N]``."""
    if not sequences:
        return
    dtype, dim = accumulated(sequences[0].q.dtype), sequences[0].q.shape[2]

    def computed(p: Precision) -> tuple[Tensor, ...]:
        parts = zip(*(x.scores_of(p, queries) for x in sequences), strict=True)
        return tuple(torch.stack(part) for part in parts)

    for i, (name, x) in enumerate((("max_scores", largest), ("key_scores", of_keys))):
        if x is not None:
            assert x.dtype == dtype, f"{name}: dtype {x.dtype}, expected {dtype}"
            hold(
                name,
                x,
                computed(EXACT)[i],
                lambda most, i=i: [
                    computed(p)[i].float() for p in eager_forms(dtype, dim, dtype, most)
                ],
            )


def check_gradients(
    sequences: list[Sequence], douts: list[Tensor], dlses: list[Tensor],
    found: dict[str, list[Tensor]],
) -> None:  # fmt: skip
    """Hold gradients by name, one tensor per sequence, to the tolerance rule."""
    if not sequences:
        return
    q, v = sequences[0].q, sequences[0].v
    dtype, dim = q.dtype, max(q.shape[2], v.shape[2], q.shape[1])
    calls = list(zip(sequences, douts, dlses, strict=True))

    def computed(p: Precision) -> dict[str, Tensor]:
        each = [x.gradients(p, dout, dlse) for x, dout, dlse in calls]
        return {name: torch.cat([x[name].flatten() for x in each]) for name in found}

    @lru_cache
    def eager(most: int) -> list[dict[str, Tensor]]:
        return [
            computed(replace(form, recomputed=recomputed))
            for form in eager_forms(dtype, dim, most=most)
            for recomputed in (False, True)
        ]

    exact = computed(EXACT)
    for name, parts in found.items():
        actual = torch.cat([x.flatten() for x in parts])

        def forms(most: int, name: str = name, dtype: torch.dtype = actual.dtype) -> list[Tensor]:
            return [x[name].to(dtype) for x in eager(most)]

        hold(f"d{name}", actual, exact[name], forms, factor=3.0)


def keep_mask(
    key: int, offset: int, dropout_p: float, batch: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Which probabilities dropout keeps: Philox4x32-10 (Salmon et al., SC 2011) in numpy.

    Returns:
        boolean ``[B, Hq, Sq, Sk]``.
    """
    words = (-(-keys // 4), queries, batch * heads)
    j, i, row = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in words), indexing="ij")
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = [j, i, row, np.full_like(j, offset & 0xFFFFFFFF)]
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64((key >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        x, y = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [(y >> shift) ^ counter[1] ^ k0, y & low32, (x >> shift) ^ counter[3] ^ k1,
                   x & low32]  # fmt: skip
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low32, (k1 + np.uint64(0xBB67AE85)) & low32
    kept = np.stack(counter, -1) >= np.uint64(int(dropout_p * 2**32))  # [j, i, row, lane]
    shape = (batch, heads, queries, 4 * words[0])
    kept = kept.transpose(2, 1, 0, 3).reshape(shape)[..., :keys]
    return torch.from_numpy(np.ascontiguousarray(kept))
