"""Merging methods: what the new heads are, and what the child layer computes."""

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.grouping import MERGING, merge_layer
from gqa_kernels.grouping.space import HeadSpace
from tests.grouping.layers import attention, computed, layer, moments, relative, tokens

X = tokens()
MAP = HeadMap([0, 1, 0, 1, 1, 2])
LOSSY = [method for method in MERGING if method != "none"]


def merged(weights, method, key_map=MAP, value_map=MAP, **options):
    return merge_layer(weights, key_map, value_map, method=method, moments=moments(X), **options)


@pytest.mark.parametrize("restore_norms", [False, True])
@pytest.mark.parametrize("method", MERGING)
def test_groups_of_one_old_head_are_exact_copies(method, restore_norms):
    weights = layer("half_split", num_kv_heads=2)
    split = HeadMap([2, 0, 0, 1, 3, 1])
    child = merged(weights, method, split, split, restore_norms=restore_norms)
    assert torch.equal(child.k, weights.k[[0, 1, 0, 1]])
    assert torch.equal(child.v_bias, weights.v_bias[[0, 1, 0, 1]])
    assert torch.equal(child.q, weights.q) and torch.equal(child.o, weights.o)
    assert (child.key_map, child.value_map) == (split, split)


@pytest.mark.parametrize("method", LOSSY)
def test_key_and_value_maps_apart(method):
    weights = layer("half_split")
    one, own = HeadMap([0] * 6), weights.key_map
    keys, values = merged(weights, method, one, own), merged(weights, method, own, one)
    assert (keys.k.shape[0], keys.v.shape[0]) == (1, 6)
    assert torch.equal(keys.v, weights.v) and torch.equal(keys.o, weights.o)
    assert torch.equal(values.k, weights.k) and torch.equal(values.q, weights.q)
    both = merged(weights, method, one, one)
    assert torch.equal(both.k, keys.k) and torch.equal(both.v, values.v)


@pytest.mark.parametrize("method", LOSSY)
def test_dtype_and_parent_are_kept(method):
    weights = layer("half_split").to(torch.bfloat16)
    before = {name: getattr(weights, name).clone() for name in ("q", "k", "v", "o", "k_bias")}
    child = merged(weights, method)
    for name, tensor in before.items():
        assert torch.equal(getattr(weights, name), tensor)
        assert getattr(child, name).dtype == torch.bfloat16


def test_mean_counts_query_heads():
    weights = layer(num_kv_heads=2)  # query heads 0-2 read old head 0, the others 1
    child = merged(weights, "mean", HeadMap([0, 0, 1, 0, 1, 1]), HeadMap([0] * 6))
    a, b = weights.rows("k")
    torch.testing.assert_close(child.rows("k"), torch.stack([(2 * a + b) / 3, (a + 2 * b) / 3]))
    torch.testing.assert_close(child.rows("v")[0], weights.rows("v").mean(0))


def test_first_and_medoid_are_old_heads():
    weights = layer()
    child = merged(weights, "first")
    assert torch.equal(child.rows("k"), weights.rows("k")[[0, 1, 5]])
    heads = computed(weights, "v", X)[:, [1, 3, 4]]
    distance = (heads[:, :, None] - heads[:, None]).square().sum((0, 2, 3))
    best = [1, 3, 4][int(distance.argmin())]
    assert torch.equal(merged(weights, "medoid").rows("v")[1], weights.rows("v")[best])


def test_random_is_new_reproducible_and_of_the_same_spread():
    weights = layer()
    child = merged(weights, "random")
    assert torch.equal(child.k, merged(weights, "random").k)
    old = weights.rows("k")[[0, 2]]
    assert child.rows("k")[0].std() == pytest.approx(float(old.std()), rel=0.3)
    assert abs(torch.corrcoef(torch.stack([child.rows("k")[0].flatten(), old[0].flatten()]))[0, 1]
               ) < 0.3  # fmt: skip


def test_weighted_follows_the_strength_of_the_readers():
    weights = layer()
    strong = weights.o.clone()
    strong[:, 3] *= 1e4
    child = merged(layer().__class__(**{**vars(weights), "o": strong}), "weighted")
    torch.testing.assert_close(child.rows("v")[1], weights.rows("v")[3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(child.rows("k")[1], weights.rows("k")[3], atol=1e-2)


@pytest.mark.parametrize("method", ["mean", "aligned", "low_rank"])
def test_restored_norms(method):
    weights = layer("half_split")
    child = merged(weights, method, restore_norms=True)
    before = computed(weights, "v", X).square().sum(2).mean(0)
    group = MAP.groups[1]
    expected = float(before[list(group)].mean())
    if method == "low_rank":  # readers see the head through their decoders
        out = torch.einsum("nd,ohd->noh", computed(child, "v", X)[:, 1], child.o[:, list(group)])
        inverse = torch.linalg.pinv(weights.o[:, list(group)].permute(1, 0, 2))
        found = float(torch.einsum("hdo,noh->nhd", inverse, out).square().sum(2).mean())
    else:
        found = float(computed(child, "v", X)[:, 1].square().sum(1).mean())
    assert found == pytest.approx(expected)
    assert float(computed(merged(weights, method), "v", X)[:, 1].square().sum(1).mean()) < expected


@pytest.mark.parametrize("rotary", ["none", "half_split", "partial"])
def test_order_of_errors(rotary):
    """Each step of freedom helps on the inputs it was fitted to."""
    weights = layer(rotary)
    errors = {m: relative(attention(merged(weights, m), X), attention(weights, X)) for m in LOSSY}
    assert errors["low_rank"] < errors["aligned"] < errors["mean"]


def test_renumbering_old_heads_makes_no_difference():
    weights = layer("half_split")
    order = [3, 0, 5, 1, 4, 2]
    numbers = HeadMap([order.index(h) for h in range(6)])
    shuffled = weights.with_rows("k", weights.rows("k")[order], numbers)
    for method in ("mean", "weighted", "aligned", "low_rank"):
        ours, theirs = (attention(merged(each, method), X) for each in (shuffled, weights))
        assert relative(ours, theirs) < 1e-9


def test_heads_before_a_norm():
    """Only what the norm leaves alone is used: scale is not, rotations are."""
    weights = layer("half_split", norm=True)
    child, turned = merged(weights, "low_rank"), merged(weights, "aligned")
    assert torch.equal(child.k, turned.k)
    assert not torch.equal(child.v, turned.v)
    assert HeadSpace.of(weights, "v", moments(X)).symmetry.scalable


class TestErrors:
    def test_unknown_method(self):
        with pytest.raises(ValueError, match=r"merging must be one of none, mean, .*got 'max'"):
            merged(layer(), "max")

    def test_empty_group(self):
        with pytest.raises(ValueError, match=r"a query head for every KV head, got none for \[1\]"):
            merged(layer(), "mean", HeadMap([0, 0, 0, 2, 2, 2]))

    def test_length_of_a_map(self):
        with pytest.raises(ValueError, match="must have 6 entries, one per query head, got 3"):
            merged(layer(), "mean", HeadMap([0, 1, 1]))

    def test_none_refuses_to_mix(self):
        with pytest.raises(ValueError, match=r"merging='none', got query heads \[0, 2\] of old"):
            merged(layer(), "none")

    def test_not_a_number(self):
        weights = layer()
        weights.k[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="k weights must be finite"):
            merged(weights, "aligned")
