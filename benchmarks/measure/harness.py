"""Measures a case: gate first, then the contestants that passed it take turns on the clock."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..data.cases import Case
from ..data.suites import AnyCase
from ..ops.registry import OPS
from ..peers.base import Contestant
from ..report.results import Row
from .limits import Limits
from .roofline import bound
from .timing import Settings, Timing, time_alternating, torch_threads


def measure(
    case: AnyCase,
    contestants: Iterable[Contestant],
    limits: Limits,
    settings: Settings,
    device: torch.device,
) -> list[Row]:
    """One row per contestant, in their order.

    A row's ``status`` is ``ok``, or has a ``reason`` beside it and no time: ``unsupported`` (it
    can't run the case), ``wrong`` (the gate refused its result) or ``failed`` (it raised).
    """
    contestants = list(contestants)
    if device.type == "cuda":  # what the case before this one left
        gc.collect()
        torch.cuda.empty_cache()
    try:
        with torch_threads(case.threads):
            verdicts, facts, timings = _gate_and_time(case, contestants, settings, device)
    except Exception as error:  # no memory for the case, say: the next may be smaller
        _raise_if_broken(device)
        failure = ("failed", _described(error))
        verdicts, facts, timings = {c.name: failure for c in contestants}, {}, {}
    return [
        _row(case, c, verdicts.get(c.name), timings.get(c.name), facts.get(c.name, {}), limits)
        for c in contestants
    ]


def _gate_and_time(
    case: AnyCase, contestants: list[Contestant], settings: Settings, device: torch.device
) -> tuple[dict[str, tuple[str, str]], dict[str, Mapping[str, Any]], dict[str, Timing]]:
    """By name: status and reason of those that are not timed; of the others, facts and times."""
    op = OPS[case.op]
    problem = op.build(case, device)
    gate = op.gate(problem)
    verdicts: dict[str, tuple[str, str]] = {}
    runs, facts = {}, {}
    for contestant in contestants:
        reason = contestant.unsupported_reason(problem)
        if reason:
            verdicts[contestant.name] = ("unsupported", reason)
            continue
        try:
            prepared = contestant.prepare(problem)
            out = prepared.run(0)
            stored = prepared.stored
            judge = gate if stored is None else op.gate(problem.over(*stored))
            judge.check(prepared.result(out))
            facts[contestant.name] = prepared.facts(out)
            runs[contestant.name] = prepared.run
        except AssertionError as error:
            verdicts[contestant.name] = ("wrong", str(error))
        except Exception as error:
            verdicts[contestant.name] = ("failed", _described(error))
            _raise_if_broken(device)
    return verdicts, facts, time_alternating(runs, len(problem.copies), device, settings)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _raise_if_broken(device: torch.device) -> None:
    """After an illegal memory access every later call on that GPU fails, so stop."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def row_key(case: AnyCase, contestant: str) -> str:
    return f"{case.key} | {contestant}"


def _row(
    case: AnyCase,
    contestant: Contestant,
    verdict: tuple[str, str] | None,
    timing: Timing | None,
    facts: Mapping[str, Any],
    limits: Limits,
) -> Row:
    row: Row = {
        "key": row_key(case, contestant.name),
        "case_key": case.key,
        "case": case.facts,
        "contestant": contestant.name,
        "kind": contestant.kind,
    }
    if verdict:
        return row | {"status": verdict[0], "reason": verdict[1]}
    rates = _rates(case, timing, limits)
    return row | {"status": "ok", **dataclasses.asdict(timing), **rates, **facts}


def _rates(case: AnyCase, timing: Timing, limits: Limits) -> Mapping[str, Any]:
    """Tokens/s of attention and, where a roofline bounds the op, work and percent of the limit."""
    if not isinstance(case, Case):
        return {}
    rates = {"tokens_per_second": case.tokens / timing.median}
    if OPS[case.op].work is None:
        return rates
    work = OPS[case.op].work(case)
    least = bound(
        work, limits.bytes_per_second(case.working_set), limits.flops_per_second(case.torch_dtype)
    )
    return rates | {
        "bytes": work.bytes,
        "flops": work.flops,
        "gbytes_per_second": work.bytes / timing.median / 1e9,
        "tflops": work.flops / timing.median / 1e12,
        "bound_by": least.by,
        "limit_seconds": least.seconds,
        "percent_of_limit": 100 * least.seconds / timing.median,
    }
