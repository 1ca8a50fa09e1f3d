"""Benchmarks over caches: gates, bytes, and the command line."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import run
from benchmarks.data.cases import CacheKind, Case
from benchmarks.data.suites import CACHE_KINDS
from benchmarks.measure.roofline import append_work, attention_work
from benchmarks.ops.caches import (
    AppendGate,
    CacheGate,
    CacheProblem,
    append_backends,
    append_peers,
    budgets,
    cache_backends,
)
from gqa_kernels import HeadMap

CASE = Case("decode-cache", "smollm2-135m", "4-3-2", 2, 1, 50, "float32", cache="pages16-int8")
CPU = torch.device("cpu")


@pytest.mark.parametrize("cache", CACHE_KINDS)
def test_gates_pass_the_reference_and_catch_what_is_wrong(cache):
    problem = CacheProblem.build(replace(CASE, cache=cache), CPU)
    contestant = cache_backends()["reference"]
    assert contestant.unsupported_reason(problem) is None
    for one in (contestant, contestant.control()):
        prepared = one.prepare(problem)
        result = prepared.result(prepared.run(0))
        CacheGate(problem).check(result)
    with pytest.raises(AssertionError, match="out: error"):
        CacheGate(problem).check(result.flip(1))
    gate = AppendGate(problem)
    for contestant in (append_backends()["reference"], append_peers()["index_put"]):
        if contestant.unsupported_reason(problem) is not None:
            kind = problem.case.cache_kind
            assert contestant.name == "index_put" and (kind.format or kind.budgets)
            continue
        prepared = contestant.prepare(problem)
        stored = prepared.result(None)
        with pytest.raises(AssertionError, match="k: other values than the reference"):
            gate.check(stored)  # nothing is appended yet
        prepared.run(0)
        gate.check(stored)


def test_bytes():
    head_map = HeadMap([0, 0, 0, 1])
    # q and out: 2 x 4 heads x 64 x 2 bytes; rows of K and V: 2 heads x 100 keys each.
    rows = 2 * 2 * 100
    int8 = attention_work(head_map, 1, 1, 100, 64, 2, kv_itemsize=1, row_scale_bytes=4)
    int4 = attention_work(head_map, 1, 1, 100, 64, 2, kv_itemsize=0.5, row_scale_bytes=4)
    assert int8.bytes == 2 * 2 * 4 * 64 + rows * (64 + 4)
    assert int4.bytes == 2 * 2 * 4 * 64 + rows * (32 + 4)
    # 5 tokens of 2 heads, K and V: read 64 x 2 bytes, write 64 bytes and a scale.
    assert append_work(head_map, 5, 64, 2, 1, 4).bytes == 2 * 5 * 2 * (128 + 64 + 4)
    assert CASE.work.bytes < replace(CASE, cache="pages16").work.bytes


@pytest.mark.parametrize("heads", ["4-3-2", "even"])
def test_budgets_of_heads_are_uneven_and_as_many_tokens_in_all(heads):
    case = replace(CASE, map=heads, cache="pages16-budgets")
    counts = budgets(case)
    assert len(counts) == case.head_map.num_kv_heads and sum(counts) == 50 * len(counts)
    assert (min(counts), max(counts)) == (25, 75)
    assert case.work.bytes == replace(case, cache="pages16").work.bytes


@pytest.mark.parametrize(
    "text", ["page16", "pages", "dense-int3", "pages16int8", "dense-budgets", "pages-budgets"]
)
def test_cache_names(text):
    assert CacheKind.parse("pages16-int8") == CacheKind(16, "int8")
    assert CacheKind.parse("pages16-budgets") == CacheKind(16, None, True)
    with pytest.raises(ValueError, match="cache must be like dense or pages16-int8"):
        CacheKind.parse(text)


def test_command_line(tmp_path):
    path = tmp_path / "results.json"
    arguments = ["--op", "decode-cache", "--op", "append", "--shapes", "smollm2-135m:2:40"]
    arguments += ["--maps", "4-3-2", "--dtype", "float32", "--caches", "pages16", "dense-int4"]
    arguments += ["--device", "cpu", "--seconds", "0.01", "--backend", "reference"]
    assert run.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = [(row["case"]["op"], row["case"]["cache"], row["contestant"]) for row in rows]
    assert len(set(names)) == 2 * 2 + 2 * 2  # decode with its control, the append with its peer
    for name, row in zip(names, rows, strict=True):
        if name == ("append", "dense-int4", "index_put"):
            assert (row["status"], row["reason"]) == ("unsupported", "the cache is quantised")
        else:
            assert row["status"] == "ok" and row["bytes"] > 0 and row["gbytes_per_second"] > 0
