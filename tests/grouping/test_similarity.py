"""similarity() against its definitions written out, and the faults of public code."""

import numpy as np
import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.grouping import search
from gqa_kernels.grouping.calibration import calibrate
from gqa_kernels.grouping.similarity import KINDS, SIDES, similarity
from tests.tiny_models import batch, tiny

MODELS = ("llama", "qwen2")  # without and with biases


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
        with pytest.raises(ValueError, match="kind must be one of weight, activation, got 'cka'"):
            similarity(tiny(), None, 0, "k", "cka")

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
        with pytest.raises(ValueError, match="must not be zero or NaN, got v head 2 of layer 1"):
            similarity(model, stats, 1, "v", kind)
