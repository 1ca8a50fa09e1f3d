"""key_norms(): against keys computed token by token."""

import pytest
import torch

from gqa_kernels.convert.plan import plan
from gqa_kernels.grouping import calibrate
from gqa_kernels.grouping.key_norms import key_norms
from gqa_kernels.grouping.search.key_norm import key_norm_sizes
from gqa_kernels.models.families import attention_layers, layer_weights
from tests.grouping.layers import layer, moments, tokens
from tests.tiny_models import batch, tiny


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotary", ["none", "half_split"])
@pytest.mark.parametrize("num_kv_heads", [6, 3])
def test_by_tokens(bias, rotary, num_kv_heads):
    x, weights = tokens(), layer(rotary, num_kv_heads=num_kv_heads, bias=bias)
    keys = torch.einsum("hdw,nw->nhd", weights.k, x)
    if bias:
        keys = keys + weights.k_bias
    keys = keys[:, list(weights.key_map)]
    pooled = [keys[:, :2].mean(1), keys[:, 2:4].mean(1), keys[:, 4].clone(), keys[:, 5].clone()]
    expected = torch.stack([part.square().sum(-1).mean().sqrt() for part in pooled])
    torch.testing.assert_close(key_norms(weights, 4, moments(x)), expected)


def test_without_moments_and_under_a_norm():
    weights = layer(bias=False)
    whole = weights.k.mean(0).square().sum().sqrt()
    torch.testing.assert_close(key_norms(weights, 1), whole[None])
    normed = layer(norm=True)
    expected = normed.k_norm.square().sum().sqrt()  # an RMS norm makes all keys alike, on average
    found = key_norms(normed, 6, moments(tokens()))
    assert found.shape == (6,) and found.max() < 2 * expected


@pytest.mark.parametrize("num_groups", [0, 7])
def test_number_of_groups(num_groups):
    with pytest.raises(ValueError, match=rf"num_groups must lie in \[1, 6\], got {num_groups}"):
        key_norms(layer(), num_groups)


@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_by_key_norms(shared):
    model = tiny(num_kv_heads=6)
    stats = calibrate(model, [batch([12, 12], "right")])
    found = plan(model, stats, 2, kind="functional", method="key_norm", sizes="free", shared=shared)
    for at, of in zip(attention_layers(model), found.layers, strict=True):
        norms = key_norms(layer_weights(at), 2, stats[at.index]).numpy()
        for result in (of.key, of.value):
            assert sorted(result.group_sizes) == sorted(key_norm_sizes(norms, 6, lo=1))
