"""Whole decoders: contestants are one function, a wrong map is refused, rows have tokens/s."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import run
from benchmarks.data.cases import end_to_end
from benchmarks.ops import decoder as e2e
from benchmarks.ops.registry import OPS
from gqa_kernels import HeadMap
from gqa_kernels.backends import dispatch
from gqa_kernels.backends.reference import ReferenceBackend

CPU = torch.device("cpu")
TINY = e2e.Architecture(num_layers=2, hidden_size=72, intermediate_size=64, vocab_size=64)


class Wrong(ReferenceBackend):
    """Takes the groups for equal."""

    name = "wrong"

    def attend(self, call):
        uniform = HeadMap.uniform(call.num_heads, call.num_k_heads)
        return super().attend(call.replace(head_map=uniform, value_head_map=uniform))


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    monkeypatch.setitem(e2e.ARCHITECTURES, "smollm2-135m", TINY)
    monkeypatch.setitem(dispatch.BACKENDS, "wrong", Wrong())


@pytest.mark.parametrize("op", ["first-token", "generate"])
@pytest.mark.parametrize("name", ["even", "4-3-2"])
def test_contestants_are_the_same_function(op, name):
    (case,) = (c for c in end_to_end("smollm2-135m", (name,), 2, 33, 3, "float32") if c.op == op)
    problem = OPS[op].build(case, CPU)
    gate = OPS[op].gate(problem)
    contestants = {"reference": OPS[op].backends()["reference"], **OPS[op].peers()}
    for contestant in contestants.values():
        if contestant.unsupported_reason(problem):
            assert (contestant.name, name) == ("gqa-sdpa", "4-3-2")
            continue
        prepared = contestant.prepare(problem)
        for _ in range(2):  # the cache is as it was
            out = prepared.run(0)
            assert out.shape == (2, 34 if op == "first-token" else 36)
        gate.check(prepared.result(out))
    wrong = OPS[op].backends()["wrong"].prepare(problem)
    if name != "even":
        with pytest.raises(AssertionError, match="logits: error"):
            gate.check(wrong.result(None))


def test_rows_have_tokens_per_second_and_no_roofline(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--op", "generate", "--shapes", "smollm2-135m:1:33:4", "--maps", "4-3-2"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--seconds", "0.01"]
    assert run.main([*arguments, "--backend", "reference", "--json", str(path)]) == 0
    rows = {row["contestant"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"reference", "expand+sdpa", "expanded-sdpa", "gqa-sdpa"}
    timed = rows["reference"]
    assert timed["tokens_per_second"] == pytest.approx(4 / timed["median"])
    assert "bytes" not in timed and "percent_of_limit" not in timed
    assert rows["gqa-sdpa"]["status"] == "unsupported"
