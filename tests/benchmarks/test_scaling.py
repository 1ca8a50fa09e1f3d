"""Axes, fits, and attention with a given number of splits or threads."""

import pytest
import torch

from benchmarks.data import scaling
from benchmarks.data.cases import decode
from benchmarks.measure.harness import row_key
from benchmarks.measure.timing import torch_threads
from benchmarks.ops.attention import Gate, Problem
from benchmarks.peers import base
from benchmarks.report import tables
from benchmarks.report.results import Results
from gqa_kernels.backends.triton import configs
from gqa_kernels.backends.triton.launch import forward as launch


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_axes_change_one_number(device):
    for name, axis in scaling.AXES.items():
        facts = [case.facts for case in axis.cases(device)]
        if name.startswith("cores") and device == "cuda":
            assert not facts
            continue
        values = [axis.value(each) for each in facts]
        assert len(values) == len(set(values)) > 3, name
        fixed = {"keys": "batch", "batch": "kv_len"}.get(name, "kv_len")
        assert len({each[fixed] for each in facts}) == 1


def test_fits_recover_known_laws():
    power = scaling.fit((x, 3e-6 * x**0.5) for x in (1, 4, 16, 64))
    assert power.exponent == pytest.approx(0.5) and power.power_r2 == pytest.approx(1)
    assert power.line_r2 < 0.99
    line = scaling.fit((x, 5e-6 + 2e-6 * x) for x in (64, 1, 4, 16))
    assert (line.fixed, line.slope) == pytest.approx((5e-6, 2e-6))
    assert line.line_r2 == pytest.approx(1) and line.power_r2 < 0.99
    assert line.points[0] == pytest.approx((1, 7e-6))
    # Weights are 1 / seconds: by hand, the line through (0, 1), (1, 1) and (1, 2) minimises
    # (a - 1)^2 + (a + b - 1)^2 + (a + b - 2)^2 / 4, so a = 1 and a + b = 6 / 5.
    weighted = scaling._line(*(torch.tensor(x).double().numpy() for x in
                               ([0, 1, 1], [1, 1, 2], [1, 1, 0.5])))  # fmt: skip
    assert weighted[:2] == pytest.approx((1, 0.2))
    with pytest.raises(ValueError, match="two different x"):
        scaling.fit([(1, 1.0), (1, 2.0)])


def test_table_of_fits():
    cases = [case for case in scaling.scaling_cases("cpu") if case.map == scaling.SKEWED]
    rows = [
        {
            "key": row_key(case, "cpu"), "case_key": case.key, "case": case.facts,
            "kind": "backend", "contestant": "cpu", "status": "ok",
            "median": 1e-6 * case.kv_len * case.batch,
        }
        for case in cases
    ]  # fmt: skip
    text = tables.scaling(Results({"device_type": "cpu"}, rows))
    keys = next(line for line in text.splitlines() if line.startswith("| keys "))
    assert keys.split(" | ")[2:6] == ["256 to 32768", "256 us to 32.8 ms", "x^1.00", "1.000"]
    assert "| batch | cpu | 1 to 32 | 1.02 ms to 32.8 ms | x^1.00" in text
    assert tables.scaling(Results({"device_type": "cpu"})) == ""


@pytest.mark.parametrize("splits", [1, 3, 4])
def test_parts_of_the_keys_make_the_whole(splits):
    (case,) = decode("smollm2-135m", ("4-3-2",), 2, 50, "float32")
    problem = Problem.build(case, torch.device("cpu"))
    out = base.attention_in_splits(
        *problem.copies[0], case.head_map, "reference", splits, case.options
    )
    Gate(problem).check(out)


def test_triton_is_told_its_splits():
    shape = configs.Shape(1, 32, 8, 1, 8192, 128, 128, 2)
    facts = configs.DeviceFacts("sm90", 132, 50 << 20)
    chosen = launch.decode_config(shape, facts).splits.num_splits
    with base._triton_splits(chosen + 1):
        assert launch.decode_config(shape, facts).splits.num_splits == chosen + 1
    assert launch.decode_config(shape, facts).splits.num_splits == chosen


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    with torch_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
