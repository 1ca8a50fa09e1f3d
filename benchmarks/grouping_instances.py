"""Dissimilarity matrices to search: families that differ in how hard their optimum is to find."""

from __future__ import annotations

import numpy as np


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
