"""model_inputs(): batches by name, with tokens and positions that the model knows."""

import pytest
import torch

from gqa_kernels.convert.evaluation import perplexity
from gqa_kernels.grouping import calibrate
from gqa_kernels.models.inputs import model_inputs
from tests import tiny_families
from tests.tiny_models import VOCABULARY, tiny


def test_names():
    assert set(model_inputs(tiny(), torch.ones(1, 3, dtype=torch.int32))) == {"input_ids"}
    assert set(model_inputs(tiny_families.tiny("vit"), torch.ones(1, 3, 8, 8))) == {"pixel_values"}


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
@pytest.mark.parametrize("use", [calibrate, perplexity])
def test_tokens_out_of_the_vocabulary(use, bad):
    ids = torch.tensor([[1, 2, bad]])
    message = rf"input_ids must lie in \[0, {VOCABULARY}\), the model's vocabulary, got {bad}"
    with pytest.raises(ValueError, match=message):
        use(tiny(), [ids])


def test_tokens_of_decoders_and_labels():
    model, given = tiny_families.tiny("t5"), tiny_families.inputs("t5")
    with pytest.raises(ValueError, match="decoder_input_ids must lie in"):
        model_inputs(model, {**given, "decoder_input_ids": given["decoder_input_ids"] + 10**6})
    labels = given["decoder_input_ids"].clone()
    labels[:, 0] = -100
    assert "labels" in model_inputs(model, {**given, "labels": labels})
    with pytest.raises(ValueError, match="labels must lie in"):
        model_inputs(model, {**given, "labels": labels - 1})


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_more_tokens_than_learned_positions(family):
    model = tiny_families.tiny(family)
    most = model.config.max_position_embeddings
    ids = torch.ones(1, most + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"at most {most} tokens a row, the model's positions"):
        calibrate(model, [ids])
    model_inputs(model, ids[:, 1:])
    rotary = tiny(max_position_embeddings=8)
    model_inputs(rotary, torch.ones(1, 9, dtype=torch.long))  # rotary positions have no end


def test_tokens_that_are_no_integers():
    with pytest.raises(TypeError, match=r"input_ids must hold integers, got torch.float32"):
        model_inputs(tiny(), {"input_ids": torch.ones(1, 3)})
