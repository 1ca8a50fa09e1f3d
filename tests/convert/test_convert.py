"""convert(): what the new projections hold, and what is refused."""

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, random_split
from gqa_kernels.models.families import attention_layers
from tests.convert.refinements import is_refinement
from tests.tiny_models import FAMILIES, tiny

UNEVEN = HeadMap([3, 0, 3, 1, 2, 1])  # refines the uniform map of 6 heads over 2


def rows(projection):
    """Projection rows by KV head, ``[Hkv, 16, d]``."""
    return projection.weight.detach().unflatten(0, (-1, 16))


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_split_copies_bit_for_bit(family):
    parent = tiny(family)
    child = convert(parent, [UNEVEN] * 2, merging="none")
    for old, new in zip(attention_layers(parent), attention_layers(child), strict=True):
        for name in ("key", "value"):
            was, now = getattr(old, name), getattr(new, name)
            for h in range(6):
                assert torch.equal(rows(now)[UNEVEN[h]], rows(was)[h // 3])
                if was.bias is not None:
                    biases = now.bias.view(-1, 16)[UNEVEN[h]], was.bias.view(-1, 16)[h // 3]
                    assert torch.equal(*biases)
    assert child.config.num_key_value_heads == 4
    assert child.config.kv_head_map == [list(UNEVEN)] * 2
    assert getattr(child.config, "value_head_map", None) is None


def test_parent_is_untouched():
    parent = tiny()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    child = convert(parent, [UNEVEN] * 2)
    with torch.no_grad():
        for tensor in child.parameters():
            tensor.zero_()
    assert parent.config.num_key_value_heads == 2
    assert getattr(parent.config, "kv_head_map", None) is None
    for name, tensor in parent.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_weights_are_the_parents_tensors(family):
    parent = tiny(family)
    maps = [HeadMap([0] * 6), HeadMap.uniform(6, 2)]  # the second layer keeps its heads
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    copied = convert(parent, maps)
    shared = convert(parent, maps, share_weights=True)
    own = {id(tensor) for tensor in parent.parameters()}
    for (name, one), other in zip(copied.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert (id(other) in own) == ("_proj." not in name or ".self_attn." not in name), name
        assert id(one) not in own
    assert all(torch.equal(t, before[name]) for name, t in parent.state_dict().items())


def test_mean_weighs_shared_heads_by_their_query_heads():
    parent = tiny()
    mixed = HeadMap([0, 0, 1, 1, 1, 0])  # group 0: old heads 0, 0, 1; group 1: 0, 1, 1
    child = convert(parent, [mixed] * 2)
    for old, new in zip(attention_layers(parent), attention_layers(child), strict=True):
        a, b = rows(old.key)
        torch.testing.assert_close(rows(new.key), torch.stack([(2 * a + b) / 3, (a + 2 * b) / 3]))


def test_key_and_value_maps_are_not_aliased():
    parent = tiny(num_kv_heads=6)
    key_map, value_map = HeadMap([0, 0, 0, 1, 1, 1]), HeadMap([0, 1, 0, 1, 0, 1])
    child = convert(parent, [(key_map, value_map)] * 2)
    layer, old = attention_layers(child)[1], attention_layers(parent)[1]
    assert (layer.key_map, layer.value_map) == (key_map, value_map)
    torch.testing.assert_close(rows(layer.key)[0], rows(old.key)[:3].mean(0))
    torch.testing.assert_close(rows(layer.value)[0], rows(old.value)[::2].mean(0))


def test_converting_twice_follows_the_first_map():
    parent = tiny()
    once = convert(parent, [UNEVEN] * 2, merging="none")
    back = convert(once, [HeadMap.uniform(6, 2)] * 2, merging="none")
    for old, new in zip(attention_layers(parent), attention_layers(back), strict=True):
        assert torch.equal(old.key.weight, new.key.weight)
        assert torch.equal(old.value.weight, new.value.weight)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_attention_fails_on_uneven_groups_that_divide(implementation):
    """It would compute the even groups instead."""
    child = convert(tiny(), [HeadMap([0, 0, 1, 2, 2, 2])] * 2, merging="none")
    child.set_attn_implementation(implementation)
    with pytest.raises(NotImplementedError, match="would compute equal groups"):
        child(torch.ones(1, 4, dtype=torch.long))
    even = convert(child, [HeadMap.uniform(6, 6)] * 2)  # which any attention computes
    even.set_attn_implementation(implementation)
    assert even(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_even_child_runs_on_stock_attention(num_kv_heads):
    parent = tiny()
    child = convert(parent, [HeadMap.uniform(6, num_kv_heads)] * 2)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(child(ids).logits, parent(ids).logits)


class TestSplit:
    @pytest.mark.parametrize("num_kv_heads", range(3, 10))
    def test_is_lossless_and_has_all_heads(self, num_kv_heads):
        parent = HeadMap.uniform(9, 3)
        for seed in range(20):
            found = random_split(parent, num_kv_heads, seed)
            assert is_refinement(found, parent)
            assert found.num_kv_heads == num_kv_heads
            assert min(found.group_sizes) > 0

    def test_seed_decides(self):
        parent = HeadMap.uniform(9, 3)
        assert random_split(parent, 5, 1) == random_split(parent, 5, 1)
        assert len({random_split(parent, 5, seed) for seed in range(20)}) > 5

    def test_parent_of_uneven_groups(self):
        parent = HeadMap([1, 1, 0, 1, 3], num_kv_heads=4)
        assert is_refinement(random_split(parent, 4, 0), parent)

    def test_refinement(self):
        parent = HeadMap.uniform(4, 2)
        assert is_refinement(HeadMap([2, 0, 1, 1]), parent)
        assert not is_refinement(HeadMap([0, 0, 0, 1]), parent)

    @pytest.mark.parametrize("num_kv_heads", [2, 10])
    def test_impossible_count(self, num_kv_heads):
        with pytest.raises(ValueError, match=rf"must lie in \[3, 9\], got {num_kv_heads}"):
            random_split(HeadMap.uniform(9, 3), num_kv_heads, 0)


class TestErrors:
    def test_unknown_family(self):
        model = tiny("cohere")
        with pytest.raises(NotImplementedError, match=r"must be one of llama, .*got 'cohere'"):
            convert(model, [UNEVEN] * 2)

    def test_projection_of_another_shape(self):
        model = tiny()
        model.model.layers[1].self_attn.k_proj = torch.nn.Linear(96, 40)
        with pytest.raises(ValueError, match="k_proj must have a multiple of 16 outputs, got 40"):
            convert(model, [UNEVEN] * 2)

    def test_restore_norms_of_another_length(self):
        with pytest.raises(ValueError, match=r"restore_norms must have one entry.*got 1"):
            convert(tiny(), [UNEVEN] * 2, restore_norms=[True])

    def test_number_of_maps(self):
        with pytest.raises(ValueError, match=r"one entry per layer \(2\), got 1"):
            convert(tiny(), [UNEVEN])

    def test_length_of_a_map(self):
        with pytest.raises(ValueError, match=r"maps\[0\] must have 6 entries.*got 3"):
            convert(tiny(), [HeadMap([0, 1, 1])] * 2)

    def test_head_that_nobody_reads(self):
        with pytest.raises(ValueError, match=r"a query head for every KV head, got none for \[1\]"):
            convert(tiny(), [HeadMap([0, 0, 0, 2, 2, 2])] * 2)

    def test_lossy_map_with_merging_none(self):
        with pytest.raises(ValueError, match=r"merging='none', got query heads \[0, 1, 5\]"):
            convert(tiny(), [HeadMap([0, 0, 1, 1, 1, 0])] * 2, merging="none")

    def test_unknown_merging(self):
        with pytest.raises(ValueError, match=r"merging must be one of none, mean, .*got 'sum'"):
            convert(tiny(), [UNEVEN] * 2, merging="sum")

    def test_map_with_a_negative_entry(self):
        with pytest.raises(ValueError, match="got -1"):
            convert(tiny(), [[0, 0, 0, 1, 1, -1]] * 2)
