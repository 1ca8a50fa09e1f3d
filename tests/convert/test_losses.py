"""MergeLosses against converted models, plan_by_loss against brute force, and layer weights."""

from itertools import product

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.convert.evaluation import evaluate
from gqa_kernels.convert.loss_plan import plan_by_loss
from gqa_kernels.convert.losses import losses_of
from gqa_kernels.convert.plan import plan
from gqa_kernels.convert.sensitivity import layer_weights_by
from gqa_kernels.grouping import calibrate, layer_errors, search
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers, layer_weights
from tests import tiny_families
from tests.grouping.brute_force import partitions
from tests.tiny_models import batch, tiny

KEYS, VALUES = HeadMap([0, 1, 0, 2, 1, 0]), HeadMap([0, 0, 1, 1, 1, 0])
HELD_OUT = [batch([16, 11], "right", seed=8), batch([9, 14], "right", seed=9)]


@pytest.fixture(autouse=True, scope="module")
def registered():
    register("asym_gqa", backend="reference")
    yield
    register("asym_gqa")


@pytest.fixture(scope="module")
def model():
    return tiny(num_kv_heads=6)


@pytest.fixture(scope="module")
def stats(model):
    return calibrate(model, [batch([16, 12], "right", seed=seed) for seed in range(4)])


def converted_errors(model, stats, maps, batches, merging):
    child = convert(model, maps, merging, moments=stats)
    child.set_attn_implementation("asym_gqa")
    return layer_errors(model, child, batches)


@pytest.mark.parametrize("merging", ["mean", "first", "medoid", "weighted", "aligned", "low_rank"])
def test_losses_are_errors_of_a_converted_model(model, stats, merging):
    losses = losses_of(model, stats, HELD_OUT, merging)
    maps = [(KEYS, VALUES)] * len(losses)
    expected = converted_errors(model, stats, maps, HELD_OUT, merging)
    assert [each.joint(KEYS, VALUES) for each in losses] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", [0, 1])
def test_a_group_is_measured_alone(model, stats, side):
    """Only heads 1, 3 and 4 share a head, of one side."""
    alone = HeadMap([0, 1, 2, 1, 1, 3]), HeadMap(range(6))
    maps = [alone[::-1] if side else alone] * len(stats)
    expected = converted_errors(model, stats, maps, HELD_OUT, "low_rank")
    losses = losses_of(model, stats, HELD_OUT)
    assert [each("kv"[side], (1, 3, 4)) for each in losses] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", sorted(tiny_families.FAMILIES))
def test_families(family):
    """Position biases, sinks, windows, norms, cross-attention: whatever a family's attention has.
    If an RMS norm follows K, losses are approximate."""
    model, given = tiny_families.tiny(family), tiny_families.inputs(family)
    stats = calibrate(model, [given])
    losses = losses_of(model, stats, [given])
    Hq = losses[0].num_heads
    maps = [(HeadMap([h // 2 for h in range(Hq)]), HeadMap([h % 2 for h in range(Hq)]))]
    expected = converted_errors(model, stats, maps * len(losses), [given], "low_rank")
    normed = layer_weights(attention_layers(model)[0]).k_norm is not None
    found = [each.joint(*maps[0]) for each in losses]
    assert found == pytest.approx(expected, rel=0.5 if normed else 1e-3)


def test_fewer_query_tokens_are_drawn(model, stats):
    (all_, *_), (some, *_) = (losses_of(model, stats, HELD_OUT, queries=q) for q in (99, 30))
    assert (all_.tokens, some.tokens) == (50, 30)
    assert some.joint(KEYS, VALUES) == pytest.approx(all_.joint(KEYS, VALUES), rel=0.5)


def test_merging_that_loses_everything_is_refused(model, stats):
    with pytest.raises(ValueError, match="'random'"):
        losses_of(model, stats, HELD_OUT, "random")


@pytest.mark.parametrize("sizes", ["free", "equal", "auto"])
def test_plan_is_the_optimum_of_brute_force(model, stats, sizes):
    """Every partition of K's and of V's heads; a joint loss no higher than any rule's."""
    losses = losses_of(model, stats, HELD_OUT)
    found = plan_by_loss(losses, [1.0, 1.0], num_kv_heads=3, sizes=sizes)
    possible = [p for p in partitions(6) if max(p) == 2]
    if sizes == "equal":
        possible = [p for p in possible if len({p.count(g) for g in p}) == 1]
    neighbours = HeadMap([0, 0, 1, 1, 2, 2])
    for index, each in enumerate(losses):
        best = []
        for side in "kv":
            totals = {p: sum(each(side, g) for g in HeadMap(p).groups) for p in possible}
            best.append(min(totals, key=totals.get))
            assert found.curves[index][side][3] == pytest.approx(totals[best[-1]])
            result = found.results[index]["kv".index(side)]
            assert result.lower_bound in (0, pytest.approx(totals[best[-1]]))
            assert result.proved == (result.objective == result.lower_bound)
        optimum = each.joint(*map(HeadMap, best))
        assert found.errors[index] <= optimum * (1 + 1e-6)
        if sizes == "auto":
            assert found.errors[index] <= each.joint(neighbours, neighbours) * (1 + 1e-6)
        elif found.candidates[index] != "joint":
            assert found.errors[index] == pytest.approx(optimum)
            assert all(r.proved for r in found.results[index])
        key, value = found.results[index]
        assert found.errors[index] == each.joint(key.head_map, value.head_map)


def test_budget_is_the_optimum_of_brute_force(model, stats):
    found = plan(model, stats, budget=9, held_out=HELD_OUT)
    curves = [
        {G: found.weights[layer] * loss for G, loss in found.curves[layer][side].items()}
        for layer in range(2)
        for side in "kv"
    ]
    counts = product(range(1, 7), repeat=4)
    best = min(sum(c[n] for c, n in zip(curves, ns, strict=True)) for ns in counts if sum(ns) <= 9)
    assert found.predicted["by layer"] == pytest.approx(best)
    assert found.predicted["by layer"] <= found.predicted["equal counts"]
    assert sum(m.num_kv_heads for pair in found.maps for m in pair) <= 9


def test_copies_of_a_parent_head_stay_together():
    """A parent with 3 KV heads of 6: the maps it has lose nothing."""
    model = tiny(num_kv_heads=3)
    stats = calibrate(model, HELD_OUT)
    found = plan(model, stats, 3, held_out=HELD_OUT)
    assert [layer.error for layer in found.layers] == pytest.approx([0, 0], abs=1e-9)
    assert plan(model, stats, 5, held_out=HELD_OUT).layers[0].key.num_groups == 5
    for pair in plan(model, stats, 2, held_out=HELD_OUT, sizes="free").maps:
        for head_map in pair:
            assert all(head_map[h] == head_map[h + 1] for h in (0, 2, 4))


def test_more_heads_than_can_be_listed():
    model = tiny(num_heads=13, num_kv_heads=13, num_hidden_layers=1)
    found = plan(model, calibrate(model, HELD_OUT), 4, held_out=HELD_OUT, sizes="free")
    (layer,) = found.layers
    assert layer.key.num_groups == layer.value.num_groups == 4
    assert not layer.key.proved
    losses = losses_of(model, calibrate(model, HELD_OUT), HELD_OUT)[0]
    neighbours = HeadMap([0] * 4 + [1] * 3 + [2] * 3 + [3] * 3)
    assert layer.error <= losses.joint(neighbours, neighbours)
    assert layer.error == losses.joint(*layer.maps)
    D = [[2 * losses("k", (min(i, j), max(i, j))) * (i != j) for j in range(13)] for i in range(13)]
    for sizes in ("free", (3, 4)):
        by_pairs = search(D, 4, "local", sizes).head_map
        by_pairs = sum(losses("k", g) for g in by_pairs.groups)
        assert found.curves[0]["k"][4] <= 1.1 * by_pairs  # before the descent


def test_pairs_of_many_heads_are_estimated():
    model = tiny(num_heads=13, num_kv_heads=13, num_hidden_layers=1, head_dim=8)
    losses = losses_of(model, calibrate(model, HELD_OUT), HELD_OUT)[0]
    assert losses.can_estimate("shared")
    torch.testing.assert_close(losses.pairs("shared"), losses.pairs("k") + losses.pairs("v"))
    for side in "kv":
        pairs = losses.pairs(side)
        for i, j in [(0, 1), (0, 2), (11, 12)]:
            assert pairs[i, j] == pairs[j, i] == pytest.approx(losses(side, (i, j)), rel=0.5)
    few = tiny(num_heads=3, num_kv_heads=3, num_hidden_layers=1, head_dim=8)
    losses = losses_of(few, calibrate(few, HELD_OUT), HELD_OUT)[0]
    assert losses.pairs("v")[0, 2] == losses("v", (0, 2))


class TestWeights:
    def test_kl_is_that_of_a_converted_model(self, model, stats):
        own, pairs = HeadMap(range(6)), HeadMap([0, 0, 1, 1, 2, 2])
        child = convert(model, [(own, own), (pairs, pairs)], "low_rank", moments=stats)
        child.set_attn_implementation("asym_gqa")
        unpadded = [{"input_ids": torch.arange(3, 27).view(2, 12)}]
        losses = losses_of(model, stats, unpadded)
        weights = layer_weights_by("kl", model, unpadded, losses, stats)
        # evaluate leaves out the last token of a row, which has no target
        expected = evaluate(model, child, unpadded).kl
        assert weights[1] * losses[1].joint(pairs, pairs) == pytest.approx(expected, rel=0.3)

    def test_fisher_predicts_the_kl_of_noise(self, model, stats):
        """Noise in all directions of a layer's output: what the estimate averages over."""
        # Not token 0: its embedding is zero, and the gradient of a norm there is huge.
        ids = [{"input_ids": torch.randint(3, 64, (32, 24), generator=torch.Generator())}]
        losses = losses_of(model, stats, ids)
        weights = layer_weights_by("fisher", model, ids, losses, stats)
        before = model(**ids[0]).logits.log_softmax(-1)
        for layer, each, weight in zip(attention_layers(model), losses, weights, strict=True):
            size = (1e-4 * each.variance / layer.output.out_features) ** 0.5
            generator = torch.Generator().manual_seed(1)
            hook = layer.output.register_forward_hook(
                lambda _, __, out, size=size, g=generator: (
                    out + size * torch.randn(out.shape, generator=g)
                )
            )
            after = model(**ids[0]).logits.log_softmax(-1)
            hook.remove()
            kl = (before.exp() * (before - after)).sum(-1).mean().item()
            assert weight * 1e-4 == pytest.approx(kl, rel=0.2)

    def test_unknown(self, model, stats):
        with pytest.raises(ValueError, match="weights must be one of"):
            layer_weights_by("best", model, HELD_OUT, [], stats)
