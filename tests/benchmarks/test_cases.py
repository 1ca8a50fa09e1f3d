"""Suites, shapes and maps as data."""

import pytest
import torch

from benchmarks.data.cases import parse_shape, vary
from benchmarks.data.models import MODELS, head_map
from benchmarks.data.suites import SUITES
from benchmarks.measure.timing import cache_bytes
from benchmarks.ops.attention import num_copies
from benchmarks.ops.registry import OPS
from gqa_kernels import HeadMap


@pytest.mark.parametrize("suite", SUITES)
def test_suites_resolve_and_name_each_case_once(suite):
    cases = SUITES[suite]
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.op in OPS
        case.check()
        if case.op != "search":
            assert case.head_map.num_heads <= MODELS[case.model].num_heads
            assert case.work.bytes > 0 and (case.work.flops > 0 or case.op == "append")


@pytest.mark.parametrize("suites", [("cpu",), ("gpu", "scaling-gpu")])
def test_suites_cover_the_models_and_maps_that_matter(suites):
    cases = [case for suite in suites for case in SUITES[suite] if case.op != "search"]
    models = {"llama-2-7b", "opt-1.3b", "llama-3-8b", "llama-3-70b", "qwen2.5-7b", "smollm2-135m"}
    assert models | {"vit-s", "vit-b", "vit-l", "t5-base"} <= {case.model for case in cases}
    maps = {case.map for case in cases}
    assert {"even", "giant", "interleaved", "pruned", "tp-3"} <= maps
    assert {f"uneven-{size}" for size in (2, 3, 4, 6)} <= maps
    ops = {case.op for case in cases}
    assert set(OPS) - {"search"} == ops
    assert {case.op for case in SUITES["quick"]} == set(OPS) == {c.op for c in SUITES["cpu"]}


def test_maps_of_a_model():
    llama = MODELS["llama-3-8b"]
    assert head_map("even", llama) == HeadMap.uniform(32, 8)
    assert sorted(head_map("giant", llama).group_sizes) == [1] * 7 + [25]
    scattered = head_map("interleaved", llama)
    assert set(scattered.group_sizes) == {4} and not scattered.is_uniform
    pruned = head_map("pruned", llama)
    assert pruned.num_heads == 24 and len(set(pruned.group_sizes)) > 1
    assert head_map("tp-3", llama).num_heads in (10, 11)
    assert head_map("9-7-5-4-3-2-1-1", llama).group_sizes == (9, 7, 5, 4, 3, 2, 1, 1)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_uneven_maps_have_the_mean_group_size_and_are_uneven(size):
    uneven = head_map(f"uneven-{size}", MODELS["llama-2-7b"])
    assert abs(uneven.num_heads / uneven.num_kv_heads - size) < 0.5
    assert min(uneven.group_sizes) >= 1 and len(set(uneven.group_sizes)) > 1
    assert uneven == head_map(f"uneven-{size}", MODELS["llama-2-7b"])


@pytest.mark.parametrize(
    "name, message", [("3-3", "must have 9 query heads, got 6"), ("odd", "map must be one of")]
)
def test_bad_map(name, message):
    with pytest.raises(ValueError, match=message):
        head_map(name, MODELS["smollm2-135m"])


def test_shapes():
    case = parse_shape("decode", "llama-3-8b:2:512")
    assert (case.batch, case.q_len, case.kv_len, case.causal) == (2, 1, 512, False)
    case = parse_shape("prefill", "llama-3-8b:2:512:64")
    assert (case.q_len, case.kv_len, case.options) == (64, 512, {"causal": True})
    assert len(vary([case], ["even", "giant"], ["float32", "bfloat16"])) == 4
    with pytest.raises(ValueError, match="shape must be MODEL:BATCH:KV_LEN"):
        parse_shape("decode", "gpt-9:1:1")


def test_cold_cases_take_copies_beyond_the_cache():
    cpu = torch.device("cpu")
    cold = next(case for case in SUITES["cpu"] if getattr(case, "cold", False))
    copies = num_copies(cold, cpu)
    assert copies > 1
    assert copies * cold.work.bytes >= 2 * cache_bytes(cpu) or copies == 64
    assert num_copies(SUITES["quick"][0], cpu) == 1
