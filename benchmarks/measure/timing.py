"""Timing of contestants that take turns: medians and quartiles of repeated samples.

Taking turns spreads a busy or slow moment of the machine over all contestants alike; who goes first
changes from round to round. Contestants get the index of the input copy to work on, so that calls
can walk over copies that no cache holds all of.

Timers: ``wall`` for CPUs; on GPUs ``graph`` (a CUDA graph of calls over rotating copies, for cases
so short that launching is what an eager call would measure) and ``events`` (device events around
single calls, the L2 cache flushed before each).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[int], Any]

GRAPH_BELOW = 200e-6  # seconds of a call under which GPU contestants are timed in a graph
GRAPH_CALLS = 32
MOST_CALLS = 1000  # in one sample
SHORTEST = 1e-7  # seconds that a call is taken for at least


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: time to spend on each contestant of a case, warm-up not counted.
        sample_seconds: shortest sample; shorter calls are repeated to fill it.
        least, most: samples of a contestant. ``least`` goes before ``seconds``.
        warmup_seconds: of a contestant, at least one call over every copy.
        patience: seconds after which a slow contestant may stop with fewer than ``least`` samples.
            One whose single call takes longer is not called again: its last warm-up call counts.
    """

    seconds: float = 0.5
    sample_seconds: float = 1e-3
    least: int = 3
    most: int = 60
    warmup_seconds: float = 0.1
    patience: float = 1.5

    def quick(self) -> Settings:
        return Settings(seconds=0.1, most=30, warmup_seconds=0.03)


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        median, low, high: of the samples; ``low`` and ``high`` are the quartiles.
        samples: how many.
        calls: in one sample, of which it is the mean.
        timer: ``"wall"``, ``"events"`` or ``"graph"``.
    """

    median: float
    low: float
    high: float
    samples: int
    calls: int
    timer: str


def time_alternating(
    runs: Mapping[str, Run], copies: int, device: torch.device, settings: Settings
) -> dict[str, Timing]:
    """Time contestants in turn.

    Args:
        runs: by name; called with the index of the copy to work on, below ``copies``.
    """
    timers = {name: _timer(run, copies, device, settings) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for name, timer in timers.items():
        if timer.call_seconds > settings.patience:
            samples[name].append(timer.call_seconds)
    racing = [name for name in runs if not samples[name]]
    while racing:
        for name in racing:
            started = time.perf_counter()
            samples[name].append(timers[name].sample())
            spent[name] += time.perf_counter() - started
        racing = [name for name in racing if not _done(samples[name], spent[name], settings)]
        racing = racing[1:] + racing[:1]
    return {name: _summary(samples[name], timers[name]) for name in runs}


def _done(samples: list[float], spent: float, settings: Settings) -> bool:
    least = settings.least if spent < settings.patience else 1
    enough = len(samples) >= least and spent >= settings.seconds
    return enough or len(samples) >= settings.most


def _summary(samples: list[float], timer: _Timer) -> Timing:
    if len(samples) > 1:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    else:
        low = median = high = samples[0]
    return Timing(median, low, high, len(samples), timer.calls, timer.name)


class _Timer:
    """Samples one contestant: ``calls`` calls, walking over the copies."""

    name: str
    call_seconds = 0.0  # of a call in the warm-up, where it is known

    def __init__(self, run: Run, copies: int, calls: int):
        self.run, self.copies, self.calls = run, copies, calls
        self._next = 0

    def next_copy(self) -> int:
        copy = self._next
        self._next = (copy + 1) % self.copies
        return copy

    def sample(self) -> float:
        """Seconds per call."""
        raise NotImplementedError


class WallTimer(_Timer):
    name = "wall"

    def sample(self) -> float:
        copies = [self.next_copy() for _ in range(self.calls)]
        started = time.perf_counter()
        for copy in copies:
            self.run(copy)
        return (time.perf_counter() - started) / self.calls


class EventTimer(_Timer):
    name = "events"

    def __init__(self, run: Run, copies: int, calls: int, flush: torch.Tensor):
        super().__init__(run, copies, calls)
        self.flush = flush

    def sample(self) -> float:
        marks = []
        for _ in range(self.calls):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run(self.next_copy())
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in marks) / (1e3 * self.calls)


class GraphTimer(_Timer):
    name = "graph"

    def __init__(self, run: Run, copies: int, calls: int):
        super().__init__(run, copies, calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._kept = [run(self.next_copy()) for _ in range(calls)]

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (1e3 * self.calls)


def _timer(run: Run, copies: int, device: torch.device, settings: Settings) -> _Timer:
    seconds = _warm_up(run, copies, device, settings)
    calls = min(MOST_CALLS, max(1, math.ceil(settings.sample_seconds / seconds)))
    if device.type == "cpu":
        timer = WallTimer(run, copies, calls)
        timer.call_seconds = seconds
        return timer
    if seconds < GRAPH_BELOW:
        try:
            return GraphTimer(run, copies, max(copies, GRAPH_CALLS))
        except RuntimeError:  # it synchronises or allocates in a way that no graph can hold
            torch.cuda.synchronize()
    flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    return EventTimer(run, copies, min(calls, 20), flush)


def _warm_up(run: Run, copies: int, device: torch.device, settings: Settings) -> float:
    """Run over every copy, then until the warm-up time is over; seconds of the fastest call."""
    started = time.perf_counter()
    calls, fastest = 0, math.inf
    while calls < copies or time.perf_counter() - started < settings.warmup_seconds:
        before = time.perf_counter()
        run(calls % copies)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
        fastest = min(fastest, time.perf_counter() - before)
    return max(fastest, SHORTEST)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (a GPU's L2)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Within, torch has this number of threads (None: as many as before)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
