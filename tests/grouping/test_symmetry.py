"""The changes of basis that are allowed, and the best one for a pair of heads."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels.grouping.symmetry import Symmetry
from tests.grouping.layers import DV, ROTARY, D, layer, rotation

TURNING = [name for name in ROTARY if name != "none"]


def products(count=5, dim=D):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)


def norm_like(weights, equal_planes):
    """RMS norm weights; the same for both dims of a plane or all different."""
    values = torch.linspace(0.5, 2, D, dtype=torch.float64)
    if equal_planes:
        values[weights.rotary.planes[:, 1]] = values[weights.rotary.planes[:, 0]]
    return replace(weights, q_norm=values, k_norm=values.flip(0) if not equal_planes else values)


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("norm", [False, True])
def test_nearest_is_orthogonal_and_reaches_the_overlap(rotary, norm):
    symmetry = Symmetry.of(layer(rotary, norm=norm), "k")
    C = products()
    R = symmetry.nearest(C)
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(D).double().expand_as(R))
    reached = torch.einsum("nab,nab->n", R, C)
    torch.testing.assert_close(reached, symmetry.overlap(C))
    # no other allowed matrix does better
    for other in symmetry.nearest(products(50)):
        assert (torch.einsum("ab,nab->n", other, C) <= reached + 1e-12).all()


@pytest.mark.parametrize("rotary", TURNING)
@pytest.mark.parametrize("norm", [False, True])
def test_allowed_matrices_commute_with_rotary_embedding(rotary, norm):
    weights = layer(rotary, norm=norm)
    turn = rotation(weights.rotary, 7.3)
    for R in Symmetry.of(weights, "k").nearest(products()):
        torch.testing.assert_close(R @ turn, turn @ R)


@pytest.mark.parametrize("equal_planes", [False, True])
def test_norm_weights_limit_what_is_allowed(equal_planes):
    weights = norm_like(layer("half_split"), equal_planes)
    symmetry = Symmetry.of(weights, "k")
    assert not symmetry.scalable
    for R in symmetry.nearest(products()):
        for norm in (weights.q_norm, weights.k_norm):
            torch.testing.assert_close(R @ norm.diag(), norm.diag() @ R)
        diagonal = torch.equal(R, R.diag().diag())
        assert diagonal != equal_planes
        if diagonal:
            assert (R.diag().abs() == 1).all()


def test_norm_without_rotary_mixes_dims_of_equal_weight():
    norm = torch.tensor([1, 1, 1, 2, 2, 3, 4, 5], dtype=torch.float64)
    symmetry = Symmetry.of(replace(layer(), q_norm=norm, k_norm=norm), "k")
    assert sorted(len(dims) for dims in symmetry.sets) == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("side", ["k", "v"])
def test_without_rotation_the_overlap_is_the_nuclear_norm(side):
    symmetry = Symmetry.of(layer(), side)
    C = products(dim=D if side == "k" else DV)
    expected = torch.linalg.matrix_norm(C, "nuc")
    torch.testing.assert_close(symmetry.overlap(C), expected)
    assert symmetry.scalable


def test_rotary_planes_turn_but_never_flip():
    weights = layer("half_split")
    R = Symmetry.of(weights, "k").nearest(products(30))
    a, b = weights.rotary.planes.T
    torch.testing.assert_close(R[:, a, a], R[:, b, b])
    torch.testing.assert_close(R[:, a, b], -R[:, b, a])
