"""Steepest descent over single moves and swaps, many partitions at a time."""

from __future__ import annotations

import numpy as np

from .core import core
from .partitions import distance_sums, move_deltas
from .problem import Problem

# A step must gain more than this, relative to the largest entry of D, so that rounding can't cycle.
_MIN_GAIN = 1e-12


def descend(problem: Problem, labels: np.ndarray, moves: bool = True) -> np.ndarray:
    """Apply the best move or swap to each partition until none gains, or the deadline passes.

    A move takes a head to another group, a swap exchanges two heads. Every partition stays within
    the size limits, so the result is feasible whenever the deadline falls.

    Args:
        labels: ``[B, H]`` feasible partitions; not modified.
        moves: False keeps the group sizes (swaps only).

    Returns:
        ``[B, H]`` partitions, each at least as good as its start.
    """
    D, G = problem.distances, problem.num_groups
    moves = moves and problem.lo < problem.hi
    compiled = core(problem.num_heads)
    if compiled is not None:
        gain, seconds = _MIN_GAIN * problem.scale, problem.time_left()
        return compiled.descend(D, G, problem.lo, problem.hi, labels, moves, gain, seconds)
    result = labels.copy()
    rows = np.arange(len(labels))  # the partitions still improving
    state = State.of(D, G, labels)
    while len(rows) and problem.time_left() > 0:
        swap_gain, first, second = _best(swap_gains(D, state))
        if moves:
            move_gain, head, group = _best(move_gains(state, problem.lo, problem.hi))
            use_move = move_gain < swap_gain
            gain = np.minimum(move_gain, swap_gain)
        else:
            use_move, gain = np.zeros(len(rows), bool), swap_gain
        going = gain < -_MIN_GAIN * problem.scale
        if not going.all():
            result[rows[~going]] = state.labels[~going]
            rows, use_move, first, second = (x[going] for x in (rows, use_move, first, second))
            if moves:
                head, group = head[going], group[going]
            state = state.take(going)
        i = np.flatnonzero(use_move)
        if len(i):
            state.move(D, i, head[i], group[i])
        i = np.flatnonzero(~use_move)
        if len(i):
            to_first, to_second = state.labels[i, second[i]], state.labels[i, first[i]]
            state.move(D, i, first[i], to_first)
            state.move(D, i, second[i], to_second)
    result[rows] = state.labels
    return result


def objectives(D: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``[B]`` objectives of ``[B, H]`` partitions."""
    together = labels[:, :, None] == labels[:, None, :]
    return ((D * together).sum(-1) / together.sum(-1)).sum(-1) / 2


class State:
    """Partitions with the sums that make a move's gain cheap.

    labels [B,H]; sums [B,H,G] distance from each head to each group; sizes, pairs [B,G] heads in,
    and sum of distances inside, each group.
    """

    def __init__(self, labels, sums, sizes, pairs):
        self.labels, self.sums, self.sizes, self.pairs = labels, sums, sizes, pairs

    @classmethod
    def of(cls, D: np.ndarray, num_groups: int, labels: np.ndarray) -> State:
        rows = np.arange(len(labels))
        sums, sizes = distance_sums(D, num_groups, labels), np.zeros((len(labels), num_groups))
        pairs = np.zeros_like(sizes)
        for h, group in enumerate(labels.T):
            sizes[rows, group] += 1
            pairs[rows, group] += sums[rows, h, group]
        return cls(labels.copy(), sums, sizes, pairs / 2)

    def take(self, keep: np.ndarray) -> State:
        return State(self.labels[keep], self.sums[keep], self.sizes[keep], self.pairs[keep])

    def move(self, D: np.ndarray, rows: np.ndarray, heads: np.ndarray, groups: np.ndarray) -> None:
        """Move one head of each given partition."""
        old = self.labels[rows, heads]
        self.pairs[rows, old] -= self.sums[rows, heads, old]
        self.pairs[rows, groups] += self.sums[rows, heads, groups]
        self.sizes[rows, old] -= 1
        self.sizes[rows, groups] += 1
        self.sums[rows, :, old] -= D[heads]
        self.sums[rows, :, groups] += D[heads]
        self.labels[rows, heads] = groups


def move_gains(state: State, lo: int, hi: int) -> np.ndarray:
    """``[B, H, G]`` change of the objective when a head moves to a group; inf if it may not."""
    labels, sizes = state.labels, state.sizes
    delta = move_deltas(state.sums, labels, sizes, state.pairs)
    delta[np.take_along_axis(sizes <= lo, labels, -1)] = np.inf
    delta = np.where((sizes >= hi)[:, None, :], np.inf, delta)
    np.put_along_axis(delta, labels[..., None], np.inf, -1)
    return delta


def swap_gains(D: np.ndarray, state: State) -> np.ndarray:
    """``[B, H, H]`` change of the objective when two heads swap; inf in one group."""
    labels = state.labels
    size = np.take_along_axis(state.sizes, labels, -1)[..., None]  # of each head's own group
    # to_group[b, i, j]: sum of distances from head j to the group of head i
    to_group = np.take_along_axis(state.sums, labels[:, None, :], -1).swapaxes(1, 2)
    own = np.einsum("bii->bi", to_group)[..., None]
    half = (to_group - own - D) / size  # change in i's group when j takes i's place
    delta = half + half.swapaxes(1, 2)
    delta[labels[:, :, None] == labels[:, None, :]] = np.inf
    return delta


def _best(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The least entry of each ``[B, H, n]``, and its place in H and n."""
    flat = delta.reshape(len(delta), -1)
    best = flat.argmin(1)
    first, second = np.divmod(best, delta.shape[2])
    return flat[np.arange(len(best)), best], first, second
