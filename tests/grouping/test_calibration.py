"""calibrate(): moments against sums over recorded activations."""

import pytest
import torch

from gqa_kernels.grouping.calibration import calibrate
from tests.tiny_models import batch, tiny


def recorded(model, batches):
    """Inputs of each attention layer, and which tokens count: ``(x [B, S, d], mask [B, S])``."""
    seen = [[] for _ in model.model.layers]
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _, __, out, i=i: seen[i].append(out))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for inputs in batches:
            model(**inputs)
    for hook in hooks:
        hook.remove()
    masks = [inputs["attention_mask"].bool() for inputs in batches]
    return [list(zip(layer, masks, strict=True)) for layer in seen]


@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_leave_padding_out(side):
    model = tiny()
    batches = [batch([9, 4], side, seed=1), batch([6, 12, 1], side, seed=2)]
    stats = calibrate(model, batches)
    for layer, pieces in zip(stats, recorded(model, batches), strict=True):
        x = torch.cat([x[mask] for x, mask in pieces]).double()
        assert layer.count == len(x) == 32
        torch.testing.assert_close(layer.mean, x.mean(0))
        torch.testing.assert_close(layer.second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_position_means_leave_padding_out():
    model = tiny()
    inputs = batch([3, 5], "right")
    layer = calibrate(model, [inputs])[0]
    (x, _), *_ = recorded(model, [inputs])[0]
    assert layer.position_count.tolist() == [2, 2, 2, 1, 1]
    torch.testing.assert_close(layer.position_mean[:3], x[:, :3].double().mean(0))
    torch.testing.assert_close(layer.position_mean[3:], x[1, 3:].double())


def test_what_padding_holds_is_irrelevant():
    model = tiny()
    inputs = batch([3, 5], "right")
    other = {**inputs, "input_ids": inputs["input_ids"] + 7 * (1 - inputs["attention_mask"])}
    for a, b in zip(calibrate(model, [inputs]), calibrate(model, [other]), strict=True):
        torch.testing.assert_close(a.second_moment, b.second_moment)
        torch.testing.assert_close(a.position_mean, b.position_mean)


def test_plain_token_tensors_and_batching_make_no_difference():
    model = tiny()
    ids = batch([8, 8, 8], "left")["input_ids"]
    whole, pieces = calibrate(model, [ids]), calibrate(model, ids.split(1))
    for a, b in zip(whole, pieces, strict=True):
        assert a.count == b.count == 24
        torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.position_mean, b.position_mean)


def test_model_is_left_as_it_was():
    model = tiny().train()
    calibrate(model, [batch([4], "left")])
    assert model.training
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_hooks_go_when_a_batch_fails():
    model = tiny()
    with pytest.raises(IndexError):
        calibrate(model, [torch.tensor([[10_000]])])
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_not_a_number():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got NaN or inf in layer 1"):
        calibrate(model, [batch([4], "left")])


@pytest.mark.parametrize("batches", [[], [batch([0, 0, 2], "left")]], ids=["none", "padding"])
def test_nothing_to_calibrate_on(batches):
    batches = [{**inputs, "attention_mask": inputs["attention_mask"] * 0} for inputs in batches]
    with pytest.raises(ValueError, match="at least one token"):
        calibrate(tiny(), batches)
