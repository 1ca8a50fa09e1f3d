"""Descent over the maps of K and of V together, from partitions that were searched apart.

The losses of K and of V don't add up exactly: probabilities that merged keys shift may fall on
values that changed as well. Where they add up well, the maps stay as they are. Otherwise single
moves and swaps of either side are tried, those first that its own losses promise most of; each is
measured with both maps merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..grouping.search.group_costs import total_cost
from ..grouping.search.group_descent import steps

_ADD_UP = 0.02  # of the loss: a smaller difference is not worth the time
_TRIES = 12  # steps measured without a gain before the descent ends
_MIN_GAIN = 1e-4  # of a step, relative to the loss
Labels = tuple[int, ...]


class Side(Protocol):
    """What the descent needs to know of a side.

    Attributes:
        pairs: ``[n, n]`` distances of its heads.
        limits: the least and the largest size of a group.
        all_known: whether ``cost`` is known for every group; otherwise ``pairs`` say which steps
            promise most.
    """

    pairs: np.ndarray
    all_known: bool

    def limits(self, num_groups: int) -> tuple[int, int]: ...

    def cost(self, heads: Sequence[int]) -> float: ...


def descend_together(
    sides: Mapping[str, Side],
    start: Mapping[str, Labels],
    joint: Callable[[Mapping[str, Labels]], float],
) -> tuple[dict[str, Labels], float]:
    """Partitions of every side, and their loss together.

    Args:
        sides: by name.
        start: labels of each side.
        joint: the loss of partitions of all sides together.
    """
    labels, value = dict(start), joint(start)
    apart = sum(total_cost(sides[name].cost, each) for name, each in labels.items())
    if abs(apart - value) <= _ADD_UP * value:
        return labels, value
    gained = True
    while gained:
        gained = False
        promised = [
            (change, name, new)
            for name, side in sides.items()
            for change, new in _promising(side, labels[name])
        ]
        for _, name, new in sorted(promised)[:_TRIES]:
            trial = {**labels, name: new}
            now = joint(trial)
            if now < value * (1 - _MIN_GAIN):
                labels, value, gained = trial, now, True
                break
    return labels, value


def _promising(side: Side, labels: Labels) -> list[tuple[float, Labels]]:
    """Partitions one step away, each after the change of the side's own loss to expect."""
    lo, hi = side.limits(max(labels) + 1)
    found, before = [], total_cost(side.cost, labels) if side.all_known else 0.0
    for change, step in steps(side.pairs, np.array(labels), max(labels) + 1, lo, hi, None):
        new = tuple(step.get(head, group) for head, group in enumerate(labels))
        if side.all_known:
            change = total_cost(side.cost, new) - before
        found.append((change, new))
    return sorted(found)[:_TRIES]
