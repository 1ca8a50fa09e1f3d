"""PredictionShift: distance of a model's predictions from a parent's."""

import pytest
import torch

from gqa_kernels.convert import convert
from gqa_kernels.convert.shift import PredictionShift
from gqa_kernels.integrations.transformers import register
from tests import tiny_families
from tests.tiny_models import batch, tiny


@pytest.fixture(autouse=True, scope="module")
def registered():
    register("asym_gqa", backend="reference")
    yield
    register("asym_gqa")


def child_of(model):
    child = convert(model, tiny_families.maps_for(model), "mean")
    child.set_attn_implementation("asym_gqa")
    return child.eval()


def test_kl_of_each_token_that_is_not_padding():
    model = tiny(num_kv_heads=6).eval()
    child, total, tokens = child_of(model), 0.0, 0
    given = [batch([9, 5], "right", seed=1), batch([7, 7], "right", seed=2)]
    with torch.no_grad():
        for each in given:
            old, new = (m(**each).logits.double().log_softmax(-1) for m in (model, child))
            kl = (old.exp() * (old - new)).sum(-1)[each["attention_mask"].bool()]
            total, tokens = total + kl.sum(), tokens + len(kl)
    shift = PredictionShift(model, given)
    assert shift(child) == pytest.approx(float(total) / tokens, rel=1e-4)
    assert shift(model) == pytest.approx(0, abs=1e-6)


def test_states_of_encoders():
    model, given = tiny_families.tiny("bert").eval(), tiny_families.inputs("bert")
    child = child_of(model)
    with torch.no_grad():
        mask = given["attention_mask"].bool()
        old, new = (m(**given).last_hidden_state[mask] for m in (model, child))
    expected = (new - old).square().sum(1).mean() / old.var(0).sum()
    assert PredictionShift(model, [given])(child) == pytest.approx(float(expected), rel=1e-4)


def test_training_mode_is_put_back():
    model = tiny(num_kv_heads=6).train()
    PredictionShift(model, [batch([9, 5], "right")])(model)
    assert model.training


def test_no_tokens():
    with pytest.raises(ValueError, match="at least one token"):
        PredictionShift(tiny(), [])
