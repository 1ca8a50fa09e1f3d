"""Uneven models in a real vLLM engine: families and caches."""

import json

import pytest

pytest.importorskip("vllm")

from tests.engine.models import (
    CONTEXT,
    FAMILIES,
    Child,
    make_child,
    make_divisible_child,
    prompts,
    quantised_attention,
)
from tests.engine.vllm_process import engine, generate, kernels, register_class
from tests.tiny_models import expanded, tiny

pytestmark = pytest.mark.engine

NEW_TOKENS = 8
OURS = ["AsymGQAImpl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("children")


@pytest.fixture(autouse=True)
def uninitialised_memory():
    """vLLM's buffers begin with what they hold: NaN there would be an error of the test."""
    import torch

    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(folder, family):
    """K and V grouped apart, another count in each layer."""
    child = make_child(family, folder)
    register_class(json.loads((child.folder / "config.json").read_text())["architectures"][0])
    asked = prompts(8, CONTEXT - NEW_TOKENS)
    with engine(child.folder) as llm:
        assert kernels(llm) == OURS
        found = generate(llm, asked, NEW_TOKENS)
    assert found == child.expected(asked, NEW_TOKENS)


@pytest.mark.parametrize("block_size", [16, 128])
def test_counts_that_divide(folder, block_size):
    """Equal groups of 6 query heads over 3 KV heads would be another function."""
    child = make_divisible_child(folder / str(block_size))
    asked = prompts(8, CONTEXT - NEW_TOKENS)
    with engine(child.folder, block_size=block_size, enable_prefix_caching=True) as llm:
        first = generate(llm, asked, NEW_TOKENS)
        assert generate(llm, asked, NEW_TOKENS) == first  # from cached prefixes
    assert first == child.expected(asked, NEW_TOKENS)


@pytest.mark.parametrize(
    "kv_cache_dtype, format, per_row, block_size",
    [
        ("fp8", "fp8_e4m3", False, 16),
        ("fp8_e5m2", "fp8_e5m2", False, 64),
        ("fp8_per_token_head", "fp8_e4m3", True, 32),
        ("int8_per_token_head", "int8", True, 16),
        ("int4_per_token_head", "int4", True, 64),
    ],
)
def test_caches(folder, kv_cache_dtype, format, per_row, block_size):
    child = make_child("llama", folder / kv_cache_dtype)
    child.oracle.set_attn_implementation(quantised_attention(format, per_row))
    asked = prompts(8, CONTEXT - NEW_TOKENS)
    with engine(child.folder, kv_cache_dtype=kv_cache_dtype, block_size=block_size) as llm:
        found = generate(llm, asked, NEW_TOKENS)
    assert found == child.expected(asked, NEW_TOKENS)


def test_compiled(folder):
    """As vLLM runs models without --enforce-eager: one graph, in which attention is an op."""
    child = make_child("llama", folder / "compiled")
    register_class("AsymGQALlamaForCausalLM")
    asked = prompts(8, CONTEXT - NEW_TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)  # inductor refuses one with a wrapper
        with engine(child.folder, enforce_eager=False) as llm:
            assert llm.llm_engine.vllm_config.compilation_config.mode.name == "DYNAMO_TRACE_ONCE"
            assert kernels(llm) == OURS
            found = generate(llm, asked, NEW_TOKENS)
    assert found == child.expected(asked, NEW_TOKENS)


def test_a_stock_model_on_our_backend(folder):
    """As vLLM's own backend runs it; and in an int8 cache, which that backend has not."""
    model = tiny("llama", 6, 2, head_dim=32)
    model.save_pretrained(folder / "even")
    asked = prompts(8, CONTEXT - NEW_TOKENS)
    with engine(folder / "even") as llm:
        assert kernels(llm) == ["CPUAttentionBackendImpl"]
        expected = generate(llm, asked, NEW_TOKENS)
    with engine(folder / "even", attention_backend="ASYM_GQA") as llm:
        assert kernels(llm) == OURS
        assert generate(llm, asked, NEW_TOKENS) == expected
    int8 = {"kv_cache_dtype": "int8_per_token_head", "attention_backend": "ASYM_GQA"}
    oracle = expanded(model)
    oracle.set_attn_implementation(quantised_attention("int8", True))
    with engine(folder / "even", **int8) as llm:
        found = generate(llm, asked, NEW_TOKENS)
    assert found == Child(folder / "even", oracle).expected(asked, NEW_TOKENS)
