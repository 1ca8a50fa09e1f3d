"""Contestants take turns, walk over the copies, and are summed up by medians and quartiles."""

import time

import torch

from benchmarks.measure.timing import Settings, time_alternating

CPU = torch.device("cpu")


def test_turns_copies_and_summary():
    calls = []

    def contestant(name, seconds):
        def run(copy):
            calls.append((name, copy))
            time.sleep(seconds)

        return run

    settings = Settings(seconds=0.02, sample_seconds=0.0, least=3, most=5, warmup_seconds=0.0)
    runs = {"a": contestant("a", 0.002), "b": contestant("b", 0.02)}
    timings = time_alternating(runs, 3, CPU, settings)
    assert timings["a"].samples == 5 and timings["b"].samples == 3
    assert 0.002 <= timings["a"].low <= timings["a"].median <= timings["a"].high
    assert timings["b"].median > 2 * timings["a"].median
    assert timings["a"].timer == "wall" and timings["a"].calls == 1

    timed = calls[6:]  # the warm-up runs each over every copy
    assert calls[:6] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert [name for name, _ in timed[:6]] == ["a", "b", "b", "a", "a", "b"]
    assert [copy for name, copy in timed if name == "a"] == [0, 1, 2, 0, 1]


def test_slow_contestants_are_let_go():
    calls = []

    def run(copy):
        calls.append(copy)
        time.sleep(0.02)

    box = {"seconds": 0.01, "sample_seconds": 0.0, "least": 5, "warmup_seconds": 0.0}
    few = time_alternating({"a": run}, 1, CPU, Settings(patience=0.05, **box))["a"]
    assert few.samples < 5 and few.low <= few.median <= few.high
    calls.clear()
    once = time_alternating({"a": run}, 1, CPU, Settings(patience=0.01, **box))["a"]
    assert len(calls) == once.samples == 1 and once.median >= 0.02


def test_short_calls_are_repeated_to_fill_a_sample():
    settings = Settings(seconds=0.01, sample_seconds=1e-3, least=2, most=3, warmup_seconds=1e-3)
    timing = time_alternating({"a": lambda copy: None}, 1, CPU, settings)["a"]
    assert timing.calls > 100
    assert timing.median < 1e-4
