"""The objective against its formula, and what is refused as a dissimilarity matrix."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.data.instances import instance
from gqa_kernels.grouping.objective import as_distances, group_cost, objective


@pytest.mark.parametrize("labels", [[0] * 5, [0, 1, 2, 3, 4], [2, 0, 2, 2, 0], [7, 7, 1, 7, 1]])
def test_formula(labels):
    D = instance("random", 5)
    expected = 0.0
    for g in set(labels):
        members = [h for h in range(5) if labels[h] == g]
        pairs = sum(D[i, j] for i, j in combinations(members, 2))
        expected += pairs / len(members)
        assert group_cost(D, members) == pytest.approx(pairs / len(members))
    assert objective(D, labels) == pytest.approx(expected)


def test_squared_distances_give_the_error_of_the_mean():
    X = np.random.default_rng(0).normal(size=(6, 3))
    D = ((X[:, None] - X[None]) ** 2).sum(-1)
    labels = np.array([0, 0, 1, 0, 1, 2])
    error = sum(((X[labels == g] - X[labels == g].mean(0)) ** 2).sum() for g in range(3))
    assert objective(D, labels) == pytest.approx(error)


def changed(i, j, value):
    D = instance("euclidean", 4)
    D[i, j] = value
    return D


@pytest.mark.parametrize(
    ("D", "message"),
    [
        (np.zeros((3, 2)), r"D must be a square matrix .*, got shape \(3, 2\)"),
        (np.zeros(4), r"D must be a square matrix .*, got shape \(4,\)"),
        (np.zeros((0, 0)), r"D must be a square matrix .*, got shape \(0, 0\)"),
        (changed(1, 2, np.nan), r"D must be finite, got nan at \(1, 2\)"),
        (changed(0, 3, np.inf), r"D must be finite, got inf at \(0, 3\)"),
        (changed(2, 1, -0.5), r"D must be non-negative, got -0.5 at \(2, 1\)"),
        (changed(2, 2, 0.5), r"D must have a zero diagonal, got 0.5 at \(2, 2\)"),
        (changed(0, 1, 99.0), r"D must be symmetric, got 99.0 at \(0, 1\)"),
    ],
)
def test_refused(D, message):
    with pytest.raises(ValueError, match=message):
        as_distances(D)


def test_rounding_is_cleaned_in_a_copy():
    D = instance("raw_cosine", 4).astype(np.float32)
    D[0, 0], D[1, 2] = -1e-8, D[1, 2] + 1e-8
    before = D.copy()
    cleaned = as_distances(D)
    assert (cleaned == cleaned.T).all() and (np.diagonal(cleaned) == 0).all() and cleaned.min() >= 0
    np.testing.assert_array_equal(D, before)
    assert not cleaned.flags.writeable


def test_what_can_hold_a_matrix():
    D = instance("random", 4)
    for holder in (D.tolist(), torch.tensor(D), SimpleNamespace(array=D)):
        np.testing.assert_array_equal(as_distances(holder), D)
