"""The best shared head of a group, against the samples it is the best for."""

from dataclasses import replace

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.grouping import low_rank, merge_layer, search_groups
from gqa_kernels.grouping.low_rank import GroupLosses, pair_estimates, shared_head
from gqa_kernels.grouping.space import HeadSpace
from tests.grouping.layers import ROTARY, attention, computed, moments, relative, tokens
from tests.grouping.layers import layer as any_layer

X = tokens()


def layer(rotary="none", **options):
    """Of unknown frequencies: then the metric has no terms across planes, as the loss assumes."""
    weights = any_layer(rotary, **options)
    known = weights.rotary
    return replace(weights, rotary=known and replace(known, frequencies=None))


def loss_of(space, weights, side, group, rows, decoders):
    """``sum_h E[e_h^T M_h e_h]`` over the tokens, for a shared head and its decoders."""
    old = computed(weights, side, X)
    shared = X @ rows[:, :-1].T + rows[:, -1]
    total = 0.0
    for h in group:
        error = old[:, space.head_map[h]] - shared @ decoders[space.head_map[h]].T
        if side == "k" and weights.rotary is None:
            error = error - error.mean(0)
        total += torch.einsum("na,ab,nb->n", error, space.metric[h], error).mean()
    return float(total)


def rows_of(space, found):
    """The shared head of a group."""
    return sum(encoder @ space.rows[head] for head, encoder in found.encoders.items())


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("num_kv_heads", [6, 3])
def test_loss_is_what_the_shared_head_leaves(rotary, side, num_kv_heads):
    weights = layer(rotary, num_kv_heads=num_kv_heads)
    space = HeadSpace.of(weights, side, moments(X))
    for group in ([0, 3], [1, 2, 5], list(range(6))):
        found = shared_head(space, group)
        reached = loss_of(space, weights, side, group, rows_of(space, found), found.decoders)
        # the ridge that keeps metrics invertible is all that separates the two
        assert reached == pytest.approx(GroupLosses(space)(group), rel=1e-3)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("rotary", ROTARY)
def test_no_other_head_loses_less(rotary, side):
    weights = layer(rotary)
    space = HeadSpace.of(weights, side, moments(X))
    group = [0, 1, 4]
    best = shared_head(space, group)
    rows = rows_of(space, best)
    least = loss_of(space, weights, side, group, rows, best.decoders)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        step = 1e-2 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        moved = loss_of(space, weights, side, group, rows + step, best.decoders)
        assert moved > least


def test_heads_that_are_functions_of_each_other_lose_nothing():
    weights = layer()
    mix = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = weights.with_rows("k", mix @ weights.rows("k")[0], weights.key_map)
    space = HeadSpace.of(weights, "k", moments(X))
    assert GroupLosses(space)(range(6)) < 1e-9 * float(space.energy.sum())
    one = HeadMap([0] * 6)
    child = merge_layer(weights, one, weights.value_map, method="low_rank", moments=moments(X))
    assert relative(attention(child, X), attention(weights, X)) < 1e-3
    turned = merge_layer(weights, one, weights.value_map, method="aligned", moments=moments(X))
    assert relative(attention(turned, X), attention(weights, X)) > 0.05


@pytest.mark.parametrize("num_kv_heads", [6, 3])
def test_estimates_of_rotated_pairs_are_exact(num_kv_heads):
    space = HeadSpace.of(layer("half_split", num_kv_heads=num_kv_heads), "k", moments(X))
    losses, found = GroupLosses(space), pair_estimates(space)
    assert not space.symmetry.sets  # every dim is rotated
    for i in range(6):
        for j in range(i + 1, 6):
            for estimate in (found[i, j], found[j, i]):
                assert float(estimate) == pytest.approx(losses((i, j)), rel=1e-6, abs=1e-9)


def test_estimates_of_other_pairs_are_lower_for_heads_that_are_alike():
    """Heads 3, 4 and 5 are those of 0, 1 and 2, and a little more."""
    weights = layer()
    rows = weights.rows("v")
    rows = torch.cat([rows[:3], rows[:3] + 0.1 * rows[3:]])
    space = HeadSpace.of(weights.with_rows("v", rows, weights.value_map), "v", moments(X))
    found = pair_estimates(space)
    twins = [found[h, h + 3] for h in range(3)]
    others = [found[i, j] for i in range(6) for j in range(i + 1, 6) if j - i != 3]
    assert max(twins) < min(others)
    assert found.diagonal().eq(0).all()


def test_losses_are_not_for_heads_before_a_norm():
    with pytest.raises(ValueError, match="space must allow scaling"):
        GroupLosses(HeadSpace.of(layer("half_split", norm=True), "k", moments(X)))


def test_partition_by_group_losses():
    """Three families of heads, each the image of one head."""
    weights = layer()
    labels = (0, 1, 0, 2, 1, 2)
    mix = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = mix @ weights.rows("v")[[labels.index(label) for label in labels]]
    weights = weights.with_rows("v", rows, weights.value_map)
    losses = GroupLosses(HeadSpace.of(weights, "v", moments(X)))
    found = search_groups(losses, 6, 3)
    assert found.labels == labels and found.proved
    assert found.objective == pytest.approx(sum(map(losses, found.head_map.groups)), abs=1e-12)


@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_components_of_large_matrices_keep_what_exact_ones_keep(decay):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(600, 900, generator=generator, dtype=torch.float64)
    data = data * torch.arange(1, 901, dtype=torch.float64) ** -decay
    gram = data @ data.T
    values = torch.linalg.eigvalsh(gram)
    found = low_rank._leading(gram, 100)
    torch.testing.assert_close(found.T @ found, torch.eye(100, dtype=torch.float64))
    lost = gram.trace() - (found.T @ gram @ found).trace()
    assert values[:500].sum() <= lost <= 1.005 * values[:500].sum()
