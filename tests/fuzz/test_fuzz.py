"""A short run of the fuzzer, and proof that it would notice what it looks for."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gqa_kernels
from gqa_kernels import HeadMap, asym_gqa_attention
from tests.dense import dense_attention
from tests.fuzz import children, hostile, memory, oracle, run
from tests.fuzz.draw import Call, Draw
from tests.fuzz.keeping import draw_keep
from tests.fuzz.oracle import Sequence

ROOT = Path(__file__).parents[2]
CALLS = 50


@pytest.mark.parametrize("which, first", [(0, 100), (-1, 150)], ids=["best", "portable"])
def test_calls_of_fixed_seeds(which, first):
    isa = children.instruction_sets()[which]
    report = children.Report()
    children.run_child(report, first, 300, isa, {}, count=CALLS)
    assert not report.faults, "\n".join(report.faults)
    assert report.calls == CALLS


def test_every_public_name_is_drawn():
    drawn = {"explain_backend", "available_backends"}
    for seed in range(400):
        if drawn >= set(gqa_kernels.__all__) - {"__version__"}:
            return
        drawn.update(run.draw_call(seed)[1].names)
    raise AssertionError(f"never drawn: {set(gqa_kernels.__all__) - {'__version__'} - drawn}")


def test_a_seed_decides_the_call():
    assert (
        str(run.draw_call(7)[1]).split("cache=")[0] == str(run.draw_call(7)[1]).split("cache=")[0]
    )
    assert len({str(run.draw_call(seed)[1]) for seed in range(9)}) == 9


@pytest.mark.parametrize("offset, at_end", [(-1, False), (1, True)])
def test_a_read_outside_a_storage_ends_the_process(offset, at_end):
    code = f"""
import ctypes, torch
from tests.fuzz.memory import guarded
x = guarded(7, torch.float32, at_end={at_end})
size = 4
print(ctypes.c_float.from_address(x.data_ptr()).value, flush=True)
ctypes.c_float.from_address(x.data_ptr() + size * ({offset} if {offset} < 0 else 7)).value
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "nan" and done.returncode == -signal.SIGSEGV, done.stderr


def test_a_crash_is_reported_with_its_seed(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    report = children.Report()
    crash = "import json, os; print(json.dumps({'seed': 5}), flush=True); os.abort()"
    monkeypatch.setattr(children, "WORKER", ["-c", crash])
    assert children.run_child(report, 5, 1, "portable", {}) == 6
    assert "seed 5" in report.faults[0] and "status -6" in report.faults[0]
    assert "--seed 5" in report.faults[0]


def test_reports_are_kept(monkeypatch, tmp_path):
    path = tmp_path / "fuzz.txt"
    path.write_text("of an earlier run\n")
    report = children.Report(path=path)
    fail = "import json; print(json.dumps({'seed': 8})); print(json.dumps({'fault': 'x\\ny'}))"
    monkeypatch.setattr(children, "WORKER", ["-c", fail + "; print(json.dumps({'done': True}))"])
    children.run_child(report, 8, 1, "portable", {})
    assert path.read_text() == "of an earlier run\n" + "\n".join(report.faults) + "\n"
    assert "seed 8: x\ny" in report.faults[0] and str(path) in report.summary()


@pytest.mark.parametrize("dtype", hostile.DTYPE_NAMES)
def test_values_of_every_dtype_can_be_spoilt(dtype):
    for seed in range(20):
        draw = Draw(seed)
        spoilt = draw.pick(*hostile.SPOIL_TENSOR)(draw, torch.ones(2, 3).to(getattr(torch, dtype)))
        assert spoilt is not None


def test_strides_and_poison_around_placed_values():
    draw = Draw(3)
    for seed in range(60):
        draw.memory.source.seed(seed)
        x = draw.normal(2, 3, 4)
        placed = draw.memory.place(x, strided=True)
        assert torch.equal(placed, x) and placed.stride(-1) == 1
        inside = placed.untyped_storage().nbytes() // 4
        whole = placed.as_strided((inside,), (1,), 0)
        assert whole.isnan().sum() == inside - x.numel()


def test_one_number_is_placed():
    assert Draw(0).memory.place(torch.tensor(2.5), strided=True).item() == 2.5


def call_with(check=lambda result: None, function=lambda **_: None, **arguments) -> Call:
    return Call(function, arguments, check, ("name",))


def test_a_modified_input_is_a_fault():
    x = memory.guarded(4, torch.float32, True).zero_()
    with pytest.raises(AssertionError, match="x was modified"):
        run.run_good(call_with(function=lambda x: x.add_(1), x=x), Draw(0))


@pytest.mark.parametrize("error, is_fault", [
    (ValueError("x must be 1, got 2"), False), (TypeError(""), True), (RuntimeError("shape"), True),
    (AttributeError("x"), True), (MemoryError(), False),
])  # fmt: skip
def test_what_a_hostile_call_may_raise(error, is_fault):
    def function():
        raise error

    call = call_with(function=function)
    if is_fault:
        with pytest.raises((AssertionError, type(error))):
            hostile.run_hostile(call)
    else:
        hostile.run_hostile(call)


@pytest.mark.parametrize("seed", range(12))
def test_oracle_is_the_four_loops(seed):
    draw = Draw(seed)
    heads, kv_heads, q_len, kv_len = 5, 3, draw.pick(1, 4), draw.pick(0, 1, 6)
    entries = draw.entries(heads, kv_heads)
    counts = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    q, k, v = (draw.normal(1, n, length, 8, dtype=torch.float64) for n, length in counts)
    options = draw.scoring(heads, 1) | {"causal": draw.chance(0.5)}
    options["attn_mask"] = draw.mask((1, heads, q_len, kv_len), torch.float32)
    lengths = draw.integers(0, kv_len, 1, kv_heads)
    loops = dense_attention(q, k, v, entries, kv_lengths=lengths, **options)
    slopes, mask = options.pop("alibi_slopes", None), options.pop("attn_mask")
    slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[0]
    mask = mask.expand(1, heads, q_len, kv_len)[0]
    one = Sequence(q[0], k[0], v[0], entries, entries, lengths[0].tolist(), slopes=slopes,
                   mask=mask, **options)  # fmt: skip
    for actual, expected in zip(one.attend(), loops, strict=True):
        torch.testing.assert_close(actual, torch.from_numpy(expected)[0], rtol=1e-10, atol=1e-12)


def test_oracle_gradients_are_autograds():
    draw = Draw(1)
    q, k, v = (draw.normal(n, 7, 6, dtype=torch.float64) for n in (4, 2, 3))
    slopes, sinks = draw.normal(4, dtype=torch.float64).abs(), draw.normal(4, dtype=torch.float64)
    leaves = dict(q=q, k=k, v=v, slopes=slopes, sinks=sinks)
    for x in leaves.values():
        x.requires_grad_()
    one = Sequence(**leaves, key_map=[1, 0, 0, 1], value_map=[2, 0, 2, 1], lengths=[7, 5],
                   causal=True, window=(4, None), softcap=2.0)  # fmt: skip
    dout, dlse = draw.normal(4, 7, 6, dtype=torch.float64), draw.normal(4, 7, dtype=torch.float64)
    lse_rows = one.attend()[1].detach().isfinite()
    dlse = dlse * lse_rows
    out, lse = one.attend()
    loss = (out * dout).sum() + (lse.masked_fill(~lse_rows, 0) * dlse).sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    found = one.gradients(oracle.EXACT, dout, dlse)
    for (name, _), value in zip(leaves.items(), expected, strict=True):
        name = {"slopes": "alibi_slopes"}.get(name, name)
        torch.testing.assert_close(found[name].detach(), value)


def test_a_keep_that_moves_nothing_is_a_fault():
    faults = 0
    for seed in range(20):
        draw = Draw(seed)
        call = draw_keep(draw)
        run.run_good(call, draw)
        again = draw_keep(Draw(seed))
        again.function = lambda kept, lengths=None, backend="auto": None
        try:
            again.check(again.function(**again.arguments))
        except AssertionError:
            faults += 1
    assert faults > 10  # the others keep every key, or have none


def test_a_wrong_result_is_a_fault():
    draw = Draw(2)
    q, k = draw.normal(1, 2, 3, 8), draw.normal(1, 1, 5, 8)
    out = asym_gqa_attention(q, k, k, HeadMap([0, 0]))
    one = [Sequence(q[0], k[0], k[0], [0, 0], [0, 0], [5])]
    oracle.check_attention(one, out, None)
    with pytest.raises(AssertionError, match="out: error"):
        oracle.check_attention(one, out * (1 + 1e-4), None)
