"""Starting partitions, and how to bring a partition within the size limits."""

from __future__ import annotations

import numpy as np

from .core import core
from .problem import Problem


def balanced_sizes(num_heads: int, num_groups: int) -> np.ndarray:
    """``[G]`` sizes that differ by at most one, larger ones first; within any feasible limits."""
    sizes = np.full(num_groups, num_heads // num_groups)
    sizes[: num_heads % num_groups] += 1
    return sizes


def even_limits(num_heads: int, num_groups: int) -> tuple[int, int]:
    """Least and largest group if sizes differ by at most one."""
    low, rest = divmod(num_heads, num_groups)
    return low, low + bool(rest)


def blocks(sizes: np.ndarray) -> np.ndarray:
    """Labels of contiguous groups of the given sizes: ``[2, 1]`` -> ``[0, 0, 1]``."""
    return np.repeat(np.arange(len(sizes)), sizes)


def random_balanced(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random partition into groups whose sizes differ by at most one."""
    return rng.permutation(blocks(balanced_sizes(problem.num_heads, problem.num_groups)))


def random_sizes(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """``[G]`` random sizes within the limits: ``lo`` each, the rest dealt out at random."""
    sizes = np.full(problem.num_groups, problem.lo)
    for _ in range(problem.num_heads - sizes.sum()):
        sizes[rng.choice(np.flatnonzero(sizes < problem.hi))] += 1
    return sizes


def repair(problem: Problem, labels: np.ndarray) -> np.ndarray:
    """The partition with as many single moves as it takes to obey ``num_groups`` and the limits.

    Each move is the cheapest one that brings some group nearer to its limits. ``labels`` lie in
    ``[0, G)``; groups may be empty.
    """
    D, G = problem.distances, problem.num_groups
    compiled = core(problem.num_heads)
    if compiled is not None:
        return compiled.repair(D, G, problem.lo, problem.hi, labels[None])[0]
    labels = labels.copy()
    while True:
        sizes = np.bincount(labels, minlength=G)
        too_big, too_small = sizes > problem.hi, sizes < problem.lo
        if not (too_big.any() or too_small.any()):
            return labels
        sums = distance_sums(D, G, labels[None])[0]
        pairs = np.bincount(labels, weights=sums[np.arange(len(labels)), labels], minlength=G) / 2
        delta = move_deltas(sums, labels, sizes, pairs)
        sources = too_big if too_big.any() else sizes > problem.lo
        targets = too_small if too_small.any() else sizes < problem.hi
        delta[~sources[labels]] = np.inf
        delta[:, ~targets] = np.inf
        head, group = np.unravel_index(np.argmin(delta), delta.shape)
        labels[head] = group


def distance_sums(D: np.ndarray, num_groups: int, labels: np.ndarray) -> np.ndarray:
    """``[B, H, G]`` sum of the distances from each head to each group of ``[B, H]`` partitions."""
    sums = np.zeros((*labels.shape, num_groups))
    rows = np.arange(len(labels))
    for h, group in enumerate(labels.T):  # one order of summation, as the compiled core's
        sums[rows, :, group] += D[h]
    return sums


def move_deltas(
    sums: np.ndarray, labels: np.ndarray, sizes: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
    """Change of the objective when one head moves to another group.

    Args:
        sums: ``[..., H, G]`` sum of distances from head to the members of each group.
        labels: ``[..., H]``.
        sizes: ``[..., G]`` group sizes; 0 is allowed.
        pairs: ``[..., G]`` sum of the distances inside each group.

    Returns:
        ``[..., H, G]``; entries for a head's own group mean nothing.
    """

    def own(values):  # [..., G] -> [..., H, 1], the value of each head's own group
        return np.take_along_axis(values, labels, axis=-1)[..., None]

    left = own(sizes) - 1
    leave = (own(pairs) - np.take_along_axis(sums, labels[..., None], axis=-1)) / np.maximum(
        left, 1
    ) - own(pairs) / own(sizes)
    join = (pairs[..., None, :] + sums) / (sizes[..., None, :] + 1)
    join = join - (pairs / np.maximum(sizes, 1))[..., None, :]
    return leave + join
