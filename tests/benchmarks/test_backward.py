"""Backward: gradients pass the gate, wrong ones do not; controls are timed only."""

import pytest
import torch

from benchmarks.data.cases import backward
from benchmarks.ops.backward import (
    BackwardGate,
    BackwardProblem,
    backward_backends,
    backward_peers,
    backward_work,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["even", "4-3-2"])
def test_gradients_pass_the_gate(name):
    (case,) = backward("smollm2-135m", (name,), 2, 60, "float32")
    problem = BackwardProblem.build(case, CPU)
    gate = BackwardGate(problem)
    ours = backward_backends()["reference"]
    ran = []
    for contestant in (ours, ours.control(), *backward_peers().values()):
        if contestant.unavailable_reason(CPU) or contestant.unsupported_reason(problem):
            continue
        prepared = contestant.prepare(problem)
        gradients = prepared.run(0)
        assert [x.shape for x in gradients] == [x.shape for x in problem.copies[0]]
        checked = prepared.result(gradients)
        gate.check(checked)
        ran.append(contestant.name)
    other = "gqa-sdpa" if name == "even" else "reference, even map"
    assert set(ran) == {"reference", "expand+sdpa", other}
    dq, dk, dv = checked
    with pytest.raises(AssertionError, match="k: error"):
        gate.check((dq, dk.roll(1, dims=1), dv))
    with pytest.raises(AssertionError, match="not finite"):
        prepared.result((dq, dk, torch.full_like(dv, torch.nan)))


def test_the_control_runs_on_equal_groups():
    (case,) = backward("smollm2-135m", ("4-3-2",), 1, 12, "float32")
    problem = BackwardProblem.build(case, CPU)
    ours = backward_backends()["reference"]
    own, even = (c.prepare(problem).run(0) for c in (ours, ours.control()))
    assert not torch.allclose(own[1], even[1])
    assert ours.control().control() is None


def test_work_is_twice_the_bytes_and_five_products_for_two():
    (case,) = backward("smollm2-135m", ("4-3-2",), 1, 5, "float32")
    # q and out: 9 heads, k and v: 3; x 5 tokens x 64 x 4 bytes, read and written; 15 pairs.
    assert backward_work(case).bytes == 2 * 4 * 64 * 5 * (2 * 9 + 2 * 3)
    assert backward_work(case).flops == 5 * 2 * 64 * 9 * 15
