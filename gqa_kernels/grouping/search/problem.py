"""The partition problem a method is given, and the rules for group sizes."""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..objective import as_distances
from ..result import Sizes


@dataclass(frozen=True)
class Problem:
    """Partition ``num_heads`` heads into exactly ``num_groups`` groups of ``lo`` to ``hi`` heads.

    Attributes:
        distances: ``[H, H]`` checked, read-only.
        num_groups: ``G``; every group has at least one head.
        lo, hi: smallest and largest group size, tightened to what any partition can reach.
        sizes: the rule they come from.
        seed: seed of every random choice.
        deadline: ``time.perf_counter()`` value after which to return the best found; inf = never.
    """

    distances: NDArray[np.float64]
    num_groups: int
    lo: int
    hi: int
    sizes: Sizes = "free"
    seed: int = 0
    deadline: float = field(default=float("inf"), compare=False)

    @classmethod
    def create(
        cls,
        D: ArrayLike,
        num_groups: int,
        sizes: Sizes = "free",
        seed: int = 0,
        time_limit: float | None = None,
    ) -> Problem:
        D = as_distances(D)
        H = D.shape[0]
        try:
            G = operator.index(num_groups)
        except TypeError:
            raise TypeError(f"num_groups must be an integer, got {num_groups!r}") from None
        if not 1 <= G <= H:
            raise ValueError(f"num_groups must lie in [1, {H}], got {G}")
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit must be positive seconds or None, got {time_limit}")
        sizes = check_sizes(sizes)
        lo, hi = size_limits(sizes, H, G)
        deadline = float("inf") if time_limit is None else time.perf_counter() + time_limit
        return cls(D, G, lo, hi, sizes, seed, deadline)

    @property
    def num_heads(self) -> int:
        return self.distances.shape[0]

    @property
    def scale(self) -> float:
        """Largest entry of D: what rounding errors are relative to. 1 if D is all zeros."""
        return float(self.distances.max()) or 1.0

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def time_left(self) -> float:
        """Seconds to the deadline; negative once it has passed."""
        return self.deadline - time.perf_counter()


def check_sizes(sizes: Sizes) -> Sizes:
    """``sizes`` as ``"free"``, ``"equal"`` or a tuple of two ints; anything else is an error."""
    if isinstance(sizes, str):
        if sizes in ("free", "equal"):
            return sizes
    else:
        try:
            lo, hi = map(operator.index, sizes)
            return lo, hi
        except (TypeError, ValueError):
            pass
    raise ValueError(f'sizes must be "free", "equal" or (lo, hi), got {sizes!r}')


def size_limits(sizes: Sizes, num_heads: int, num_groups: int) -> tuple[int, int]:
    """Smallest and largest size a group can have under a checked rule.

    Raises:
        ValueError: no partition of ``num_heads`` into ``num_groups`` groups obeys the rule.
    """
    H, G = num_heads, num_groups
    if sizes == "equal":
        if H % G:
            raise ValueError(f'num_groups must divide {H} heads for sizes="equal", got {G}')
        return H // G, H // G
    lo, hi = (1, H) if sizes == "free" else sizes
    if not 1 <= lo <= hi:
        raise ValueError(f"sizes must be (lo, hi) with 1 <= lo <= hi, got {sizes}")
    if not lo * G <= H <= hi * G:
        raise ValueError(
            f"sizes must let {G} groups hold {H} heads (lo * {G} <= {H} <= hi * {G}), got {sizes}"
        )
    return max(lo, H - hi * (G - 1)), min(hi, H - lo * (G - 1))
