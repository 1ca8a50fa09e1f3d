"""Measures a case: gate first, then the contestants that passed it take turns on the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .cases import Case
from .contestants import Contestant, Prepared
from .limits import Limits
from .ops import OPS
from .roofline import bound
from .timing import Settings, Timing, time_alternating

Row = dict[str, Any]


def measure(
    case: Case,
    contestants: Iterable[Contestant],
    limits: Limits,
    settings: Settings,
    device: torch.device,
) -> list[Row]:
    """One row per contestant, in their order.

    A row's ``status`` is ``ok``, or has a ``reason`` beside it and no time: ``unsupported`` (it
    can't run the case), ``wrong`` (the gate refused its result) or ``failed`` (it raised).
    """
    op = OPS[case.op]
    problem = op.build(case, device)
    gate = op.gate(problem)
    verdicts: dict[str, tuple[str, str]] = {}
    ready: dict[str, Prepared] = {}
    contestants = list(contestants)
    for contestant in contestants:
        reason = contestant.unsupported_reason(problem)
        if reason:
            verdicts[contestant.name] = ("unsupported", reason)
            continue
        try:
            prepared = contestant.prepare(problem)
            gate.check(prepared.result(prepared.run(0)))
            ready[contestant.name] = prepared
        except AssertionError as error:
            verdicts[contestant.name] = ("wrong", str(error))
        except Exception as error:
            verdicts[contestant.name] = ("failed", f"{type(error).__name__}: {error}"[:500])
            _raise_if_broken(device)
    runs = {name: prepared.run for name, prepared in ready.items()}
    timings = time_alternating(runs, len(problem.copies), device, settings)
    return [_row(case, c, verdicts.get(c.name), timings.get(c.name), limits) for c in contestants]


def _raise_if_broken(device: torch.device) -> None:
    """A GPU that ran into an illegal access answers nothing any more: stop there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def row_key(case: Case, contestant: str) -> str:
    return f"{case.key} | {contestant}"


def _row(
    case: Case,
    contestant: Contestant,
    verdict: tuple[str, str] | None,
    timing: Timing | None,
    limits: Limits,
) -> Row:
    row: Row = {
        "key": row_key(case, contestant.name),
        "case_key": case.key,
        "case": {
            **dataclasses.asdict(case),
            "num_heads": case.head_map.num_heads,
            "num_kv_heads": case.head_map.num_kv_heads,
            "head_dim": case.head_dim,
            "group_sizes": list(case.head_map.group_sizes),
        },
        "contestant": contestant.name,
        "kind": contestant.kind,
    }
    if verdict:
        return row | {"status": verdict[0], "reason": verdict[1]}
    return row | {"status": "ok", **dataclasses.asdict(timing), **_rates(case, timing, limits)}


def _rates(case: Case, timing: Timing, limits: Limits) -> Mapping[str, Any]:
    """Tokens/s and, where a roofline bounds the op, work, rates and percent of the limit."""
    rates = {"tokens_per_second": case.batch * case.q_len / timing.median}
    if OPS[case.op].work is None:
        return rates
    work = OPS[case.op].work(case)
    working_set = work.bytes if not case.cold else 1 << 62
    least = bound(
        work, limits.bytes_per_second(working_set), limits.flops_per_second(case.torch_dtype)
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
