"""Tensor parallelism in a real vLLM: worker processes over gloo, sizes that they don't divide."""

import json

import pytest

pytest.importorskip("vllm")

from gqa_kernels import HeadMap
from tests.engine.models import CONTEXT, Child, make_child, prompts, quantised_attention
from tests.engine.vllm_process import engine, generate, refusal, register_class, uneven_heads
from tests.tiny_families import UNEVEN
from tests.tiny_models import expanded, tiny

pytestmark = pytest.mark.engine

NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def workers():
    """What worker processes inherit: there are more of them than cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `uneven_heads`
        yield


def check(child: Child, ranks: int, expected_heads: list, **options) -> None:
    """Tokens as transformers', and the heads that each rank holds.

    Args:
        expected_heads: for each rank and layer, its query, K and V heads.
    """
    asked = prompts(8, CONTEXT - NEW_TOKENS)
    with engine(child.folder, **over(ranks), **options) as llm:
        assert llm.apply_model(uneven_heads) == expected_heads
        found = generate(llm, asked, NEW_TOKENS)
    assert found == child.expected(asked, NEW_TOKENS)


def over(ranks: int) -> dict:
    return {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}


def shards(maps, ranks: int) -> list:
    """What ``HeadMap.shard`` assigns."""
    found = []
    for rank in range(ranks):
        parts = [key.shard(rank, ranks, value_head_map=value) for key, value in maps]
        found.append([(len(p.query_heads), len(p.kv_heads), len(p.value_heads)) for p in parts])
    return found


@pytest.mark.parametrize(
    "family, ranks",
    [
        ("llama", 4),
        *(pytest.param(family, ranks, marks=pytest.mark.slow)
          for family, ranks in (("qwen3", 2), ("gemma2", 3), ("opt", 3), ("gpt2", 2))),
    ],
)  # fmt: skip
def test_uneven_children(tmp_path, family, ranks):
    """6 query heads, and feed-forward layers of 64, over ranks that divide neither."""
    child = make_child(family, tmp_path)
    register_class(json.loads((child.folder / "config.json").read_text())["architectures"][0])
    check(child, ranks, shards(UNEVEN, ranks))


@pytest.mark.slow
def test_caches_with_scales(tmp_path):
    """A rank with fewer KV heads than another one reads its scales, too."""
    child = make_child("llama", tmp_path)
    register_class("AsymGQALlamaForCausalLM")
    child.oracle.set_attn_implementation(quantised_attention("int8", True))
    check(child, 3, shards(UNEVEN, 3), kv_cache_dtype="int8_per_token_head")


def test_an_even_model(tmp_path):
    """Three ranks for 32 query heads over 8 KV heads, which vLLM's own class refuses."""
    model = tiny("llama", 32, 8, hidden_size=64, head_dim=16)
    model.save_pretrained(tmp_path)
    even = HeadMap.uniform(32, 8)
    expected = shards([(even, None)] * 2, 3)
    assert [layers[0][0] for layers in expected] == [11, 11, 10]
    register_class("AsymGQALlamaForCausalLM")
    child = Child(tmp_path, expanded(model))
    check(child, 3, expected, hf_overrides={"architectures": ["AsymGQALlamaForCausalLM"]})


def test_experts_are_refused(tmp_path):
    child = make_child("gpt_oss", tmp_path)
    error = refusal(child.folder, options=over(2))
    assert "quantised or have experts, got 2" in error
