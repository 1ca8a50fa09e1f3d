"""Agglomerative clustering (SciPy): merge the two nearest groups until G are left."""

from __future__ import annotations

import numpy as np

from .partitions import repair
from .problem import Problem
from .registry import Found

LINKAGES = ("ward", "average", "complete", "single")


def solve(problem: Problem, linkage: str = "ward") -> Found:
    """The tree cut at ``num_groups`` groups, then moved within the size limits if they bind.

    Args:
        linkage: one of ``LINKAGES``. Ward works on the square roots of D, so that each merge is
            the one that raises the objective least.
    """
    return solve_all([problem], linkage)[0]


def solve_all(problems: list[Problem], linkage: str = "ward") -> list[Found]:
    """Every cut of one tree."""
    if linkage not in LINKAGES:
        raise ValueError(f"linkage must be one of {', '.join(LINKAGES)}, got {linkage!r}")
    merges = _merges(problems[0].distances, linkage)
    return [Found(repair(p, _cut(merges, p.num_heads, p.num_groups))) for p in problems]


def _merges(D: np.ndarray, linkage: str) -> np.ndarray:
    """``[H - 1, 2]``: the clusters each step merges; step ``t`` makes cluster ``H + t``."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(D) == 1:
        return np.zeros((0, 2), np.intp)
    distances = np.sqrt(D) if linkage == "ward" else D
    tree = hierarchy.linkage(squareform(distances, checks=False), linkage)
    return tree[:, :2].astype(np.intp)


def _cut(merges: np.ndarray, num_heads: int, num_groups: int) -> np.ndarray:
    """``[H]`` labels after the first ``H - G`` merges."""
    clusters = {h: [h] for h in range(num_heads)}
    for step, (a, b) in enumerate(merges[: num_heads - num_groups]):
        clusters[num_heads + step] = clusters.pop(a) + clusters.pop(b)
    labels = np.empty(num_heads, np.intp)
    for g, heads in enumerate(clusters.values()):
        labels[heads] = g
    return labels
