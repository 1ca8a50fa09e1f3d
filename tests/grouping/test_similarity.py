"""similarity() against its definitions written out, and the faults of public code."""

import numpy as np
import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.grouping import objective, search
from gqa_kernels.grouping.calibration import calibrate
from gqa_kernels.grouping.similarity import KINDS, SIDES, layer_similarity, similarity
from gqa_kernels.grouping.space import HeadSpace
from tests.grouping.layers import D, computed, layer, moments, tokens
from tests.tiny_models import batch, tiny

MODELS = ("llama", "qwen2")  # without and with biases
X = tokens()
OWN = HeadMap(range(6))


def cosine_distances(rows):
    """1 - cosine of every pair of rows, one by one."""
    rows = [np.asarray(row, dtype=np.float64).ravel() for row in rows]
    return np.array([[1 - a @ b / np.sqrt((a @ a) * (b @ b)) for b in rows] for a in rows]) * (
        1 - np.eye(len(rows))
    )


def projected(model, inputs, layer, name):
    """A projection's output of real tokens at each position, by head, averaged over the texts."""
    seen = []
    projection = getattr(model.model.layers[layer].self_attn, name)
    hook = projection.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    mask = inputs["attention_mask"][..., None]
    mean = (seen[0] * mask).sum(0) / mask.sum(0)  # [P, Hkv * D]
    return mean.unflatten(1, (-1, 16)).transpose(0, 1)  # [Hkv, P, D]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("side", "name"), [("k", "k_proj"), ("v", "v_proj")])
def test_activation(family, side, name):
    model = tiny(family, num_kv_heads=6)
    inputs = batch([9, 4, 6], "right")
    found = similarity(model, calibrate(model, [inputs]), 1, side, "activation")
    expected = cosine_distances(projected(model, inputs, 1, name))
    np.testing.assert_allclose(found.array, expected, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("side", "name"), [("k", "k_proj"), ("v", "v_proj")])
def test_weight(family, side, name):
    model = tiny(family, num_kv_heads=6)
    projection = getattr(model.model.layers[0].self_attn, name)
    rows = projection.weight.detach()
    if projection.bias is not None:
        rows = torch.cat([rows, projection.bias.detach()[:, None]], 1)
    found = similarity(model, None, 0, side, "weight")
    expected = cosine_distances(rows.unflatten(0, (6, 16)))
    np.testing.assert_allclose(found.array, expected, atol=1e-12)


def heads_of(weights, side, x):
    """``[H, n * D]`` the heads of a side for all tokens."""
    return computed(weights, side, x).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("side", ["k", "v"])
def test_cosine_from_moments(side):
    weights = layer("half_split")
    expected = cosine_distances(heads_of(weights, side, X))
    found = layer_similarity(weights, moments(X), side, "activation_moment")
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("side", ["k", "v"])
def test_linear_cka(side):
    """By the Gram matrices of the tokens (Kornblith et al., equation 2)."""
    weights = layer()
    x = X[:40]
    heads = computed(weights, side, x).transpose(0, 1)
    heads = heads - heads.mean(1, keepdim=True)
    expected = cosine_distances([head @ head.T for head in heads])
    np.testing.assert_allclose(layer_similarity(weights, moments(x), side, "cka"), expected)


def test_aligned_is_the_distance_after_procrustes():
    """V against scipy's solver; K of rotary models against a search over each plane's angle."""
    from scipy.linalg import orthogonal_procrustes

    weights = layer("half_split")
    found = layer_similarity(weights, moments(X), "v", "aligned")
    cosine = layer_similarity(weights, moments(X), "v", "aligned_cosine")
    heads = computed(weights, "v", X).transpose(0, 1).numpy()
    mean = np.square(heads).sum((1, 2)).mean()
    for i, j in ((0, 1), (2, 5)):
        R, _ = orthogonal_procrustes(heads[j], heads[i])
        turned = heads[j] @ R
        assert found[i, j] == pytest.approx(np.square(heads[i] - turned).sum() / (2 * mean))
        norms = np.linalg.norm(heads[i]) * np.linalg.norm(turned)
        assert cosine[i, j] == pytest.approx(1 - (heads[i] * turned).sum() / norms)


@pytest.mark.parametrize("rotary", ["half_split", "interleaved", "partial"])
def test_aligned_keys_turn_plane_by_plane(rotary):
    weights = layer(rotary, bias=False)
    a, b = weights.rotary.planes.T
    heads = computed(weights, "k", X)  # [n, H, D]
    angles = torch.linspace(0, 2 * torch.pi, 20001, dtype=torch.float64)
    z = torch.complex(heads[..., a], heads[..., b])
    product = (z[:, 0] * z[:, 1].conj()).sum(0)
    best = (product[:, None] * torch.exp(1j * angles)).real.max(1).values.sum()
    rest = heads[..., weights.rotary.dim :]
    best += torch.linalg.matrix_norm(rest[:, 0].T @ rest[:, 1], "nuc") if rest.numel() else 0
    energy = heads.square().sum((0, 2))
    expected = (energy[0] + energy[1] - 2 * best) / (2 * energy.mean())
    found = layer_similarity(weights, moments(X), "k", "aligned")[0, 1]
    assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["functional", "functional_raw"])
def test_functional_is_the_error_of_what_the_head_feeds(kind):
    """V: the change of the output when one head takes the other's place, both ways."""
    weights = layer()
    heads = computed(weights, "v", X)
    space = HeadSpace.of(weights, "v", moments(X))

    def output(h, values):
        return torch.einsum("ne,oe->no", values, weights.o[:, h]).square().sum(1).mean()

    total = sum(output(h, heads[:, h]) for h in range(6)) / 6
    i, j = 1, 4
    R = torch.eye(6).double()
    if kind == "functional":
        R = space.symmetry.nearest(space.cross[i, j])
    error = output(i, heads[:, i] - heads[:, j] @ R.T) + output(j, heads[:, j] - heads[:, i] @ R)
    found = layer_similarity(weights, moments(X), "v", kind)[i, j]
    assert found == pytest.approx(float(error / (4 * total)))


def test_low_rank_of_a_pair_is_below_its_aligned_error():
    weights = layer("half_split")
    for side in ("k", "v"):
        low, turned = (
            layer_similarity(weights, moments(X), side, kind) for kind in ("low_rank", "functional")
        )
        off = ~np.eye(6, dtype=bool)
        # with D_ij the least loss of the pair, doubled by the objective's 1/|S|
        assert (low[off] > 0).all() and (low[off] <= 2 * turned[off]).all()


class TestWeightSharingError:
    """QCQA's error: public code counts heads outside the group and weights by its number."""

    WEIGHTS = layer("half_split", bias=False)

    def error(self, labels):
        total = 0.0
        for rows in (self.WEIGHTS.k, self.WEIGHTS.v):
            for g in set(labels):
                group = rows[[h for h, label in enumerate(labels) if label == g]]
                total += float((group - group.mean(0)).square().sum()) / rows[0].numel()
        return total / 2

    @pytest.mark.parametrize(
        "labels", [range(6), [0] * 6, (0, 1, 0, 1, 1, 2)], ids=["identity", "MQA", "uneven"]
    )
    def test_objective_is_the_error(self, labels):
        D = layer_similarity(self.WEIGHTS, None, "shared", "weight_sharing_error")
        assert objective(D, labels) == pytest.approx(self.error(list(labels)))

    def test_identity_is_free_and_one_group_is_not(self):
        D = layer_similarity(self.WEIGHTS, None, "shared", "weight_sharing_error")
        assert objective(D, range(6)) == 0
        assert objective(D, [0] * 6) > 0.5


def test_turning_heads_hides_them_from_raw_measures_only():
    weights = layer("half_split")
    space = HeadSpace.of(weights, "k")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, D, D, generator=generator, dtype=torch.float64)
    turned = weights.with_rows("k", space.symmetry.nearest(noise) @ weights.rows("k"), OWN)
    for kind in KINDS:
        ours, theirs = (layer_similarity(w, moments(X), "k", kind) for w in (turned, weights))
        blind = kind in ("cka", "aligned", "aligned_cosine")
        assert np.allclose(ours, theirs) == blind or kind in ("functional", "low_rank")


@pytest.mark.parametrize("kind", KINDS)
def test_shared_is_the_mean_of_both_sides(kind):
    model = tiny(num_kv_heads=6)
    stats = calibrate(model, [batch([9], "left")])
    k, v, shared = (similarity(model, stats, 0, side, kind).array for side in ("k", "v", "shared"))
    np.testing.assert_allclose(shared, (k + v) / 2)
    assert not np.allclose(k, v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_shape_symmetry_and_diagonal(kind, side):
    model = tiny()
    stats = calibrate(model, [batch([9], "left")])
    D = similarity(model, stats, 1, side, kind)
    assert (D.layer, D.side, D.kind) == (1, side, kind)
    assert D.array.shape == (6, 6)
    assert D.array.dtype == np.float64
    assert (D.array == D.array.T).all()
    assert (D.array.diagonal() == 0).all()
    assert (D.array >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_query_heads_that_share_a_kv_head_are_found_again(kind):
    """Also where they are not next to each other."""
    order = HeadMap([1, 0, 2, 2, 0, 1])
    model = convert(tiny(num_kv_heads=6), [HeadMap([0, 1, 2, 2, 1, 0])] * 2)
    model = convert(model, [order] * 2, merging="none")
    stats = calibrate_as_expanded(model)
    for side in SIDES:
        found = search(similarity(model, stats, 0, side, kind), 3)
        assert found.labels == (0, 1, 2, 2, 1, 0)
        assert found.objective == 0


def calibrate_as_expanded(model):
    from gqa_kernels.integrations.transformers import register

    register()
    model.set_attn_implementation("asym_gqa")
    return calibrate(model, [batch([9, 5], "left")])


def test_search_does_not_change_the_distances():
    D = similarity(tiny(num_kv_heads=6), None, 0, "k", "weight")
    before = D.array.copy()
    search(D, 2)
    assert (D.array == before).all()


class TestErrors:
    def test_side(self):
        with pytest.raises(ValueError, match=r"side must be one of .*got 'q'"):
            similarity(tiny(), None, 0, "q", "weight")

    def test_kind(self):
        with pytest.raises(ValueError, match=r"kind must be one of weight, .*, got 'cosine'"):
            similarity(tiny(), None, 0, "k", "cosine")

    def test_layer(self):
        with pytest.raises(ValueError, match=r"layer must lie in \[0, 2\), got 2"):
            similarity(tiny(), None, 2, "k", "weight")

    def test_no_stats(self):
        with pytest.raises(ValueError, match="stats must be given for kind='activation', got None"):
            similarity(tiny(), None, 0, "k", "activation")

    @pytest.mark.parametrize("kind", KINDS)
    def test_zero_head(self, kind):
        model = tiny(num_kv_heads=6)
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[32:48] = 0
        stats = calibrate(model, [batch([9], "left")])
        with pytest.raises(ValueError, match=r"zero, got zeros in v head 2 \(layer 1\)"):
            similarity(model, stats, 1, "v", kind)

    def test_stats_that_are_not_finite(self):
        model = tiny(num_kv_heads=6)
        stats = calibrate(model, [batch([9], "left")])
        stats[1].second_moment[0, 0] = np.nan
        with pytest.raises(ValueError, match=r"activations must be finite.*\(layer 1\)"):
            similarity(model, stats, 1, "k", "aligned")

    def test_heads_that_are_silent_on_the_calibration_inputs(self):
        weights = layer(bias=False)
        x = X.clone()
        x[:, 0] = 0
        weights.v[2, :, 1:] = 0
        with pytest.raises(ValueError, match="zero on the calibration inputs, got a v head"):
            layer_similarity(weights, moments(x), "v", "aligned_cosine")
