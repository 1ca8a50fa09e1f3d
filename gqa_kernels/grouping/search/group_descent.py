"""Descent over single moves and swaps if the cost of a group is known only as a whole.

Measuring a group is slow, so steps are tried in the order of what they would gain if costs were
sums over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .descent import State, move_gains, swap_gains

_MIN_GAIN = 1e-9  # of a step, relative to the cost


def descend(
    cost: Callable[[tuple[int, ...]], float],
    pairs: np.ndarray,
    labels: Sequence[int],
    lo: int,
    hi: int,
    patience: int | None = None,
) -> tuple[list[int], float]:
    """A partition and its cost.

    Args:
        cost: of a group, its heads ascending.
        pairs: ``[H, H]`` distances of heads whose sums over pairs are near the costs.
        labels: where to start; sizes within the limits.
        lo, hi: sizes allowed.
        patience: steps tried without a gain before it ends; None: all.
    """
    labels = np.asarray(labels, dtype=np.intp).copy()
    num_groups = int(labels.max()) + 1
    costs = [cost(_members(labels, g)) for g in range(num_groups)]
    gained = True
    while gained:
        gained = False
        for _, step in steps(pairs, labels, num_groups, lo, hi, patience):
            new = labels.copy()
            new[list(step)] = list(step.values())
            changed = {int(g) for h in step for g in (labels[h], new[h])}
            after = {g: cost(_members(new, g)) for g in changed}
            before = sum(costs[g] for g in changed)
            if sum(after.values()) < before * (1 - _MIN_GAIN):
                labels, gained = new, True
                for g, value in after.items():
                    costs[g] = value
                break
    return labels.tolist(), sum(costs)


def steps(
    pairs: np.ndarray, labels: np.ndarray, num_groups: int, lo: int, hi: int, limit: int | None
) -> Iterator[tuple[float, dict[int, int]]]:
    """``{head: its new group}`` of moves and swaps, the most promising first, each after the change
    of the cost that ``pairs`` promise."""
    state = State.of(pairs, num_groups, labels[None])
    moves = move_gains(state, lo, hi)[0].ravel() if lo < hi else np.zeros(0)
    swaps = np.triu(swap_gains(pairs, state)[0], 1)
    swaps[np.tri(len(labels), dtype=bool)] = np.inf
    gains = np.concatenate((moves, swaps.ravel()))
    order = np.argsort(gains, kind="stable")[:limit]
    for index in order[np.isfinite(gains[order])]:
        if index < len(moves):
            head, group = divmod(int(index), num_groups)
            yield float(gains[index]), {head: group}
        else:
            i, j = divmod(int(index) - len(moves), len(labels))
            yield float(gains[index]), {i: int(labels[j]), j: int(labels[i])}


def _members(labels: np.ndarray, group: int) -> tuple[int, ...]:
    return tuple(np.flatnonzero(labels == group).tolist())
