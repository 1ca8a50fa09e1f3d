"""Fingerprints: equal for equal parts, and a message that names what changed."""

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, load, save
from gqa_kernels.models.fingerprint import DataDigest, check_same, fingerprint
from tests.tiny_models import tiny

DATA = [torch.arange(6).view(2, 3), {"input_ids": torch.ones(1, 4, dtype=torch.long)}]


def differing(a, b):
    return {name for name in a | b if a.get(name) != b.get(name)}


def test_a_model_loaded_again_has_the_same(tmp_path):
    model = tiny()
    loaded = load(save(model, tmp_path / "model"))
    assert fingerprint(loaded) == fingerprint(model)
    loaded.set_attn_implementation("eager")
    assert fingerprint(loaded) == fingerprint(model)


def test_each_part_is_seen():
    model, own = tiny(), fingerprint(tiny())
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias = None
        model.model.norm.weight[3] += 1e-6
    assert differing(own, fingerprint(model)) == {"weights"}
    model = tiny()
    model.config.rms_norm_eps *= 2
    assert differing(own, fingerprint(model)) == {"model config"}
    child = convert(tiny(), [HeadMap([0, 0, 1, 1, 1, 2])] * 2, "mean")
    other = convert(tiny(), [HeadMap([0, 0, 1, 1, 2, 2])] * 2, "mean")
    assert "head maps" in differing(fingerprint(child), fingerprint(other))
    assert differing(own, fingerprint(tiny().bfloat16())) == {"weights"}


@pytest.mark.parametrize("change", ["value", "shape", "order", "type", "count"])
def test_data(change):
    a, b = torch.arange(6).view(2, 3), torch.ones(2, 2)
    given = {
        "value": [a + torch.tensor([0, 0, 1]), b],
        "shape": [a.view(3, 2), b],
        "order": [b, a],
        "type": [a.int(), b],
        "count": [a],
    }[change]
    assert fingerprint(batches=[a, b]) != fingerprint(batches=given)


def test_a_digest_of_batches_so_far():
    digest, values = DataDigest(), []
    for batch in DATA:
        digest.add(batch)
        values.append({"data": digest.value})
    assert values == [fingerprint(batches=DATA[:1]), fingerprint(batches=DATA)]
    assert digest.count == 2


def test_message():
    stored = fingerprint(tiny(), DATA, steps=3, rate=0.5)
    check_same("file", stored, fingerprint(tiny(), steps=3))  # parts of the file only don't matter
    with pytest.raises(ValueError) as raised:
        check_same("file", stored, fingerprint(tiny(num_kv_heads=3), DATA[:1], steps=4, rate=0.5))
    message = str(raised.value)
    assert "other parts than this run: model config, weights, data, steps (was 3, is 4)." in message
    assert "delete the file" in message and "\n" not in message
    with pytest.raises(ValueError, match=r"seed \(was not given, is 1\)"):
        check_same("file", stored, fingerprint(seed=1))
    with pytest.raises(ValueError, match="must say what it was made from"):
        check_same("file", None, {})
