"""Spend a total of KV heads over the layers: exact multiple-choice knapsack.

Each layer has a curve, the objective it would have with each number of KV heads; choose one point
of each curve so that the heads fit the budget and the sum of the objectives is least. Dynamic
programming over layers and heads spent is exact; QCQA's second stage searches the same space by
evolution.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .result import SearchResult


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        num_kv_heads: ``[L]`` KV heads of each layer.
        cost: sum of the layers' costs, minimal for this budget.
    """

    num_kv_heads: tuple[int, ...]
    cost: float

    @property
    def total(self) -> int:
        """KV heads spent over all layers."""
        return sum(self.num_kv_heads)


def allocate(curves: Sequence[Mapping[int, float | SearchResult]], budget: int) -> Allocation:
    """The cheapest choice of one point per layer that spends at most ``budget`` KV heads.

    Args:
        curves: per layer ``{number of KV heads: cost}``; a cost may be a ``SearchResult``, as
            ``search_curve`` returns them. Layers may offer different numbers. Multiply costs by
            weights first if some layers matter more than others.
        budget: KV heads in total over the layers. Of two choices that cost the same, the one that
            spends fewer heads is taken.

    Raises:
        ValueError: there are no layers, a curve is empty or holds a negative number of heads or a
            cost that is not finite, or even the smallest choices exceed the budget.

    Examples:
        >>> from gqa_kernels.grouping import allocate
        >>> important, dull = {1: 9.0, 2: 1.0}, {1: 2.0, 2: 1.0}  # cost by number of KV heads
        >>> allocate([important, dull], budget=3).num_kv_heads
        (2, 1)
    """
    budget = operator.index(budget)
    if not curves:
        raise ValueError("curves must hold at least one layer, got none")
    layers = [_points(layer, curve) for layer, curve in enumerate(curves)]
    least = sum(min(points) for points in layers)
    if budget < least:
        raise ValueError(f"budget must be at least {least} KV heads for these curves, got {budget}")
    best: dict[int, float] = {0: 0.0}  # cheapest cost of the layers so far by heads spent
    chosen: list[dict[int, int]] = []  # per layer, its heads on the way to each number spent
    for points in layers:
        following: dict[int, float] = {}
        choice: dict[int, int] = {}
        for spent, cost in best.items():
            for heads, extra in points.items():
                total = spent + heads
                if total <= budget and cost + extra < following.get(total, math.inf):
                    following[total], choice[total] = cost + extra, heads
        best = following
        chosen.append(choice)
    spent = min(best, key=lambda total: (best[total], total))
    cost, heads_of = best[spent], []
    for choice in reversed(chosen):
        heads_of.append(choice[spent])
        spent -= heads_of[-1]
    return Allocation(tuple(reversed(heads_of)), cost)


def _points(layer: int, curve: Mapping[int, float | SearchResult]) -> dict[int, float]:
    """One layer's curve as plain numbers."""
    points = {}
    for heads, cost in curve.items():
        cost = float(cost.objective if isinstance(cost, SearchResult) else cost)
        if operator.index(heads) < 0:
            raise ValueError(f"curves[{layer}] must count KV heads from 0, got {heads}")
        if not math.isfinite(cost):
            raise ValueError(f"curves[{layer}][{heads}] must be finite, got {cost}")
        points[operator.index(heads)] = cost
    if not points:
        raise ValueError(f"curves[{layer}] must hold at least one point, got none")
    return points
