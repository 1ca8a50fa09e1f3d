"""vLLM computes no equal groups for an uneven child, with this package and without it.

``tests/integrations/test_loaders.py`` names the other loaders.
"""

import json

import pytest

pytest.importorskip("vllm")

from gqa_kernels.convert import load
from tests.engine.models import make_divisible_child
from tests.engine.vllm_process import refusals

pytestmark = pytest.mark.engine

UNKNOWN = ("AsymGQALlamaForCausalLM", "not")
EQUAL = ("which would compute equal groups",)
WITHOUT_US = {  # options of vllm.LLM, and what the error must say
    "by save": ({}, UNKNOWN),
    "by save_pretrained": ({}, UNKNOWN),
    "model_impl": ({"model_impl": "transformers"}, UNKNOWN),
}
WITH_US = {
    "edited": ({}, EQUAL),
    "hf_overrides": ({"hf_overrides": {"architectures": ["InternLM3ForCausalLM"]}}, EQUAL),
    "model_impl": (
        {"model_impl": "transformers", "hf_overrides": {"architectures": ["LlamaForCausalLM"]}},
        EQUAL,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The child as this package writes it, as transformers does, and with an edited config."""
    folder = tmp_path_factory.mktemp("loaders")
    child = make_divisible_child(folder).folder
    found = {"by save_pretrained": folder / "transformers", "edited": folder / "edited"}
    for one in found.values():
        load(child).save_pretrained(one)
    file = found["edited"] / "config.json"
    config = {**json.loads(file.read_text()), "architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(config))
    return lambda name: found.get(name, child)


def errors(folders, attempts: dict, **environment: str) -> dict[str, str]:
    """What vLLM says to each attempt, all in one process."""
    asked = {name: (folders(name), options) for name, (options, _) in attempts.items()}
    return refusals(asked, **environment)


def test_without_us(folders):
    """Without our plug-in, vLLM knows no class of that name."""
    found = errors(folders, WITHOUT_US, VLLM_PLUGINS="")
    for name, (_, expected) in WITHOUT_US.items():
        assert all(x in found[name] for x in expected), (name, found[name])


def test_with_us(folders):
    """vLLM's own classes don't read maps: our plug-in looks before one is built."""
    found = errors(folders, WITH_US)
    for name, (_, expected) in WITH_US.items():
        assert all(x in found[name] for x in expected), (name, found[name])
