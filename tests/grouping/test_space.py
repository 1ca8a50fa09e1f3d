"""The moments of heads against means over tokens."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels.grouping.space import HeadSpace
from tests.grouping.layers import D, computed, layer, moments, rotation, tokens

X = tokens()


def outer(a, b):
    return torch.einsum("nia,njb->ijab", a, b) / len(a)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["k", "v"])
def test_cross_moments(side, bias):
    weights = layer("half_split", bias=bias)
    heads = computed(weights, side, X)
    space = HeadSpace.of(weights, side, moments(X))
    torch.testing.assert_close(space.cross, outer(heads, heads))
    torch.testing.assert_close(space.energy, heads.square().sum(2).mean(0))


@pytest.mark.parametrize("bias", [False, True])
def test_keys_that_are_not_rotated_are_centred(bias):
    weights = layer(bias=bias)
    heads = computed(weights, "k", X)
    heads = heads - heads.mean(0)
    torch.testing.assert_close(HeadSpace.of(weights, "k", moments(X)).cross, outer(heads, heads))


def test_without_moments_heads_are_compared_by_their_weights():
    weights = layer("half_split")
    rows = weights.rows("k")
    space = HeadSpace.of(weights, "k")
    torch.testing.assert_close(space.cross[1, 2], rows[1] @ rows[2].T)


def test_score_metric():
    """The mean squared score of an error that has nothing to do with the query."""
    weights = layer()
    q = computed(weights, "q", X)
    error = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (q @ error / D**0.5).square().mean(0)
    metric = HeadSpace.of(weights, "k", moments(X)).metric
    torch.testing.assert_close(torch.einsum("a,hab,b->h", error, metric, error), expected)


@pytest.mark.parametrize("rotary", ["half_split", "interleaved", "partial"])
def test_score_metric_of_rotated_heads_is_a_mean_over_distances(rotary):
    """The error of a key ``t`` tokens before its query."""
    weights = layer(rotary)
    q = computed(weights, "q", X)
    error = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = [rotation(weights.rotary, -t) @ error for t in range(512)]
    expected = torch.stack([(q @ e / D**0.5).square().mean(0) for e in turned]).mean(0)
    metric = HeadSpace.of(weights, "k", moments(X)).metric
    torch.testing.assert_close(torch.einsum("a,hab,b->h", error, metric, error), expected)


def test_score_metric_without_frequencies_knows_planes_only():
    weights = layer("partial")
    known = HeadSpace.of(weights, "k", moments(X)).metric
    unknown = replace(weights, rotary=replace(weights.rotary, frequencies=None))
    metric = HeadSpace.of(unknown, "k", moments(X)).metric
    a, b = weights.rotary.planes.T
    torch.testing.assert_close(metric[:, a, a], metric[:, b, b])
    rest = slice(weights.rotary.dim, None)
    torch.testing.assert_close(metric[:, rest, rest], known[:, rest, rest])
    assert metric[:, : weights.rotary.dim, rest].abs().max() < 1e-12
    torch.testing.assert_close(metric.diagonal(0, 1, 2).sum(1), known.diagonal(0, 1, 2).sum(1))


def test_output_metric():
    weights = layer()
    error = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.einsum("ohe,e->ho", weights.o, error).square().sum(1)
    metric = HeadSpace.of(weights, "v", moments(X)).metric
    torch.testing.assert_close(torch.einsum("a,hab,b->h", error, metric, error), expected)


def test_heads_before_a_norm_count_alike_whatever_their_scale():
    weights = layer("half_split", norm=True, bias=False)
    louder = weights.with_rows("k", weights.k * torch.arange(1, 7)[:, None, None], weights.key_map)
    ours, theirs = (HeadSpace.of(each, "k", moments(X)).cross for each in (weights, louder))
    torch.testing.assert_close(ours, theirs)


class TestErrors:
    def test_not_finite(self):
        given = moments(X)
        given.second_moment[3, 3] = torch.nan
        with pytest.raises(ValueError, match="activations must be finite, got NaN or inf"):
            HeadSpace.of(layer(), "v", given)
        broken = layer()
        broken.k[2, 0, 0] = torch.inf
        with pytest.raises(ValueError, match="k weights must be finite"):
            HeadSpace.of(broken, "k", moments(X))

    def test_zero_head(self):
        weights = layer(bias=False)
        weights.v[4] = 0
        with pytest.raises(ValueError, match="heads must not be zero, got zeros in v head 4"):
            HeadSpace.of(weights, "v", moments(X))
