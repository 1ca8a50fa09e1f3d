"""evaluate(): against numbers worked out from the models' own outputs."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.convert.evaluation import evaluate, perplexity
from gqa_kernels.grouping.evaluation import layer_errors
from gqa_kernels.integrations.transformers import register
from tests import tiny_families
from tests.tiny_models import batch, split, tiny

MAPS = (HeadMap([0, 0, 1, 0, 1, 2]), HeadMap([0, 1, 1, 0, 1, 0]))


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def pair(family):
    parent = tiny_families.tiny(family)
    child = convert(parent, [MAPS] * len(tiny_families.maps_for(parent)))
    child.set_attn_implementation("asym_gqa")
    return parent, child


@torch.no_grad()
def log_probs(model, inputs):
    return model(**inputs).logits.double().log_softmax(-1)


def test_language_model():
    parent, child = pair("llama")
    batches = [batch([9, 5], "right", seed=1), batch([7, 7], "right", seed=2)]
    found = evaluate(parent, child, batches)
    losses, divergences, same = [[], []], [], []
    for inputs in batches:
        p, q = log_probs(parent, inputs), log_probs(child, inputs)
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            for t in range(length - 1):
                target = inputs["input_ids"][row, t + 1]
                losses[0].append(-p[row, t, target])
                losses[1].append(-q[row, t, target])
                divergences.append((p[row, t].exp() * (p[row, t] - q[row, t])).sum())
                same.append(p[row, t].argmax() == q[row, t].argmax())
    assert found.tokens == len(same) == 24
    mean = [math.exp(sum(each) / len(each)) for each in losses]
    assert found.parent_perplexity == pytest.approx(mean[0], rel=1e-4)
    assert found.perplexity == pytest.approx(mean[1], rel=1e-4)
    assert found.kl == pytest.approx(float(sum(divergences)) / 24, rel=1e-3)
    assert found.top1_agreement == pytest.approx(sum(same).item() / 24)
    assert found.kv_heads == ((3, 2), (3, 2))
    assert found.state_cosine is None
    assert perplexity(child, batches) == pytest.approx(found.perplexity)
    assert json.loads(found.to_json())["tokens"] == 24


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_entropies(family):
    """Entropies against eager attention's weights."""
    parent, child = pair(family)
    given = tiny_families.inputs(family)
    found = evaluate(parent, child, [given])
    parent.set_attn_implementation("eager")
    with torch.no_grad():
        weights = parent(**given, output_attentions=True)
    names = ("attentions",)
    if family == "t5":
        names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    probabilities = [p for name in names for p in weights[name]]
    for layer, p in enumerate(probabilities):
        mask = torch.ones(p.shape[0], p.shape[2], dtype=torch.bool)
        if "attention_mask" in given and p.shape[2] == given["attention_mask"].shape[1]:
            mask = given["attention_mask"].bool()
        entropy = torch.special.entr(p).sum(-1).transpose(1, 2)[mask].mean().item()
        assert found.parent_entropy[layer] == pytest.approx(entropy, rel=1e-4)
    assert len(found.entropy) == len(probabilities)
    assert all(a != b for a, b in zip(found.entropy, found.parent_entropy, strict=True))


def test_output_errors_are_those_of_layer_errors():
    parent, child = pair("llama")
    given = tiny_families.inputs("llama")
    assert evaluate(parent, child, [given]).output_error == tuple(
        layer_errors(parent, child, [given])
    )


def test_lossless_child():
    parent = tiny()
    found = evaluate(parent, split(parent, 4), [batch([12, 7], "right")])
    assert found.perplexity == pytest.approx(found.parent_perplexity, rel=1e-5)
    assert abs(found.kl) < 1e-6
    assert found.top1_agreement == 1
    assert max(found.output_error) < 1e-5
    assert found.entropy == pytest.approx(found.parent_entropy, rel=1e-5)


def test_encoder_states():
    parent, child = pair("bert")
    given = tiny_families.inputs("bert")
    found = evaluate(parent, child, [given])
    with torch.no_grad():
        states = [
            model(**given).last_hidden_state[given["attention_mask"].bool()]
            for model in (parent, child)
        ]
    cosine = torch.cosine_similarity(*states, dim=-1).mean().item()
    assert found.state_cosine == pytest.approx(cosine, rel=1e-5)
    assert found.perplexity is found.kl is found.top1_agreement is None


def test_models_are_left_as_they_were():
    parent, child = pair("llama")
    evaluate(parent, child, [batch([5], "right")])
    assert parent.config._attn_implementation == "sdpa"
    assert child.config._attn_implementation == "asym_gqa"
    for layer in parent.model.layers:
        assert not layer.self_attn._forward_pre_hooks


def test_perplexity_of_padded_rows():
    model, inputs = tiny(), batch([9, 5], "right")
    rows = [inputs["input_ids"][0], inputs["input_ids"][1, :5]]
    with torch.no_grad():
        loss = sum(
            cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows
        )
    assert perplexity(model, [inputs]) == pytest.approx(math.exp(loss / 12), rel=1e-4)


class TestErrors:
    def test_no_tokens(self):
        parent, child = pair("llama")
        with pytest.raises(ValueError, match="at least one token to compare"):
            evaluate(parent, child, [])
        with pytest.raises(ValueError, match="at least two tokens in a row"):
            perplexity(parent, [torch.ones(3, 1, dtype=torch.long)])

    def test_models_of_another_depth(self):
        with pytest.raises(ValueError, match=r"attention layers as parent \(2\), got 3"):
            evaluate(tiny(), tiny(num_hidden_layers=3), [batch([5], "right")])
