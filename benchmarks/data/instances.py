"""Dissimilarity matrices to search: families that differ in how hard their optimum is to find."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from gqa_kernels.grouping import search
from gqa_kernels.grouping.result import Sizes


def random(H: int, rng: np.random.Generator) -> np.ndarray:
    """Independent uniform dissimilarities: no structure at all."""
    D = np.triu(rng.random((H, H)), 1)
    return D + D.T


def planted(H: int, rng: np.random.Generator) -> np.ndarray:
    """Squared distances of points around ``H / 4`` centres, in clusters of random sizes."""
    centres = rng.normal(size=(max(2, H // 4), 16))
    return _squared(centres[rng.integers(len(centres), size=H)] + 0.5 * rng.normal(size=(H, 16)))


def euclidean(H: int, rng: np.random.Generator) -> np.ndarray:
    """Squared distances of normal points in 8 dimensions."""
    return _squared(rng.normal(size=(H, 8)))


def raw_cosine(H: int, rng: np.random.Generator) -> np.ndarray:
    """1 - cosine of vectors whose spectrum decays, like heads compared as they are."""
    X = rng.normal(size=(H, 64)) * np.exp(-np.arange(64) / 16)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return _clean(1 - X @ X.T)


def aligned_cosine(H: int, rng: np.random.Generator) -> np.ndarray:
    """1 - similarity after the best rotation of one head onto the other (Procrustes)."""
    scales = np.exp(-np.arange(24) / rng.uniform(3, 9, size=(H, 1)))
    heads = rng.normal(size=(H, 24, 16)) * scales[..., None]
    heads /= np.linalg.norm(heads, axis=(1, 2), keepdims=True)
    products = np.einsum("iab,jac->ijbc", heads, heads)
    return _clean(1 - np.linalg.svd(products, compute_uv=False).sum(-1))


FAMILIES = {f.__name__: f for f in (random, planted, euclidean, raw_cosine, aligned_cosine)}


def instance(family: str, num_heads: int, seed: int = 0) -> np.ndarray:
    """``[H, H]`` dissimilarities of a family."""
    return FAMILIES[family](num_heads, np.random.default_rng(seed))


def _squared(X: np.ndarray) -> np.ndarray:
    return ((X[:, None] - X[None]) ** 2).sum(-1)


def _clean(D: np.ndarray) -> np.ndarray:
    """Without what rounding left below zero, on the diagonal or off symmetry."""
    D = np.maximum((D + D.T) / 2, 0)
    np.fill_diagonal(D, 0)
    return D


@dataclass(frozen=True)
class SearchCase:
    """One matrix to partition.

    Attributes:
        family: of ``FAMILIES``.
        heads, groups: ``H`` and ``G``.
        rule: of the group sizes: ``free``, ``equal`` or ``LO..HI``.
    """

    family: str
    heads: int
    groups: int
    rule: str = "free"
    op: str = field(default="search", init=False)
    dtype: str = field(default="float64", init=False)
    cache: None = field(default=None, init=False)
    threads: None = field(default=None, init=False)

    @property
    def map(self) -> str:
        return f"{self.heads}:{self.groups}:{self.rule}"

    @property
    def key(self) -> str:
        return f"{self.op} {self.family} {self.map}"

    @property
    def facts(self) -> dict:
        """What a row says of the case."""
        return {
            "op": self.op, "model": self.family, "map": self.map, "dtype": self.dtype,
            "heads": self.heads, "groups": self.groups, "rule": self.rule,
        }  # fmt: skip

    @cached_property
    def sizes(self) -> Sizes:
        """The rule as ``search`` takes it."""
        match = re.fullmatch(r"(\d+)\.\.(\d+)", self.rule)
        return (int(match[1]), int(match[2])) if match else self.rule

    def check(self) -> None:
        """Raises ValueError where the rule can't be met."""
        if self.family not in FAMILIES:
            raise ValueError(f"family must be among {', '.join(FAMILIES)}, got {self.family!r}")
        search(np.zeros((self.heads, self.heads)), self.groups, "neighbour", self.sizes)


def parse_instance(text: str) -> SearchCase:
    """``FAMILY:HEADS:GROUPS[:RULE]``."""
    match = re.fullmatch(r"(\w+):(\d+):(\d+)(?::(free|equal|\d+\.\.\d+))?", text)
    if not match:
        raise ValueError(
            "shape of a search must be FAMILY:HEADS:GROUPS[:free|equal|LO..HI] with a family out "
            f"of {', '.join(FAMILIES)}, got {text!r}"
        )
    return SearchCase(match[1], int(match[2]), int(match[3]), match[4] or "free")
