"""The benchmark harness: ``python -m benchmarks.run --help``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Spinning OpenMP threads slow a shared machine 25 times; OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gqa_kernels.models.fingerprint import fingerprint

from .data.cases import CACHE_OPS, parse_shape, vary
from .data.instances import parse_instance
from .data.suites import SUITES, AnyCase
from .measure.harness import measure, row_key
from .measure.limits import Limits
from .measure.timing import Settings
from .ops.registry import ALIASES, OPS
from .peers.base import Contestant
from .report import display
from .report.compare import compare
from .report.results import FOLDER, Results, folder_name, header

SLOW_SEARCHES = "NSGA-II, 100*"
SUITE_WITHOUT = {  # contestants left out by default
    "quick": ["flex", SLOW_SEARCHES],  # compiling flex takes 10 s a case
    "cpu": [SLOW_SEARCHES],
    "scaling": ["*, even map", "*, dense cache"],
    "scaling-gpu": ["*, even map", "*, dense cache"],
}
SUITE_PEERS = {"scaling": [], "scaling-gpu": []}  # others: all
NOT_BY_DEFAULT = "reference"  # eager, materialises all scores
DEVICE_SECONDS = {"cpu": 0.2, "cuda": 0.15}  # per contestant and case


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status. 0: fine, 1: a wrong result or a regression, 2: it could not run."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        if arguments.compare:
            return _compare(arguments.compare, console)
        if arguments.list:
            display.show_list(console, _device(arguments.device))
            return 0
        return _run(arguments, console)
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=SUITES, help="named cases (quick, unless --shapes are given)")
    add("--quick", action="store_true", help="the quick suite with short samples")
    ops = [*OPS, *ALIASES]
    add("--op", action="append", choices=ops, help="only this op (repeatable; all)")
    add(
        "--shapes", nargs="+", metavar="SHAPE",
        help="own cases: MODEL:BATCH:KV_LEN[:Q_LEN], or FAMILY:HEADS:GROUPS[:SIZES] of --op search",
    )  # fmt: skip
    add("--maps", nargs="+", metavar="MAP", help="own cases' maps (even), or a filter of the suite")
    add("--dtype", nargs="+", metavar="TYPE", help="likewise for types (bfloat16)")
    add("--caches", nargs="+", metavar="CACHE", help="likewise (dense), as pages16 or dense-int8")
    add("--backend", nargs="+", default=["*"], metavar="NAME", help="ours; patterns (all)")
    add("--peer", nargs="*", default=None, metavar="NAME", help="peers; patterns (those usable)")
    add("--device", choices=DEVICE_SECONDS, help="(cuda where there is one)")
    add("--threads", type=int, help="of torch on the CPU (torch's own choice)")
    add("--seconds", type=float, help="per contestant and case (0.2; GPU 0.15; quick 0.1)")
    add("--budget", type=float, metavar="SECONDS", help="start no case after so long")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--save", action="store_true", help=f"write them to {FOLDER.name}/DEVICE/SUITE.json")
    add("--resume", action="store_true", help="go on with the results file: skip cases it has")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="ratios of two results files")
    add("--list", action="store_true", help="show models, maps, suites, contestants")
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = _device(arguments.device)
    suite, cases = _cases(arguments)
    for case in cases:
        case.check()  # a map that does not fit its model is refused before anything is timed
    cases = [c for c in cases if c.threads is None or c.threads <= torch.get_num_threads()]
    chosen, reasons = _contestants(arguments, suite, device, {case.op for case in cases})
    options = fingerprint(quick=arguments.quick, seconds=arguments.seconds)
    results = Results(header(device, suite, reasons, options))
    path = arguments.json
    if arguments.save:
        path = FOLDER / folder_name(results.header) / f"{suite}.json"
    if arguments.resume and path is None:
        raise ValueError("--resume must come with --json or --save, got neither")
    if arguments.resume and path.exists():
        results.resume(Results.load(path), path)
    limits, settings = Limits(device), _settings(arguments, device)
    display.show_header(console, results.header)

    started = saved = time.monotonic()
    finished = True
    with _bars(console) as bars:
        task = bars.add_task("", total=len(cases))
        for case in cases:
            bars.update(task, description=case.key)
            if not all(results.has(row_key(case, c.name)) for c in chosen[case.op]):
                if arguments.budget and time.monotonic() - started > arguments.budget:
                    finished = False
                    break
                rows = measure(case, chosen[case.op], limits, settings, device)
                results.add(rows)
                display.show_case(console, case, rows)
                now = time.monotonic()
                results.header["seconds"] += now - saved
                saved = now
                if path is not None:
                    results.save(path, limits)
            bars.advance(task)
    display.show_limits(console, limits)
    took = f"{time.monotonic() - started:.0f} s"
    done = "all cases done" if finished else "out of time; --resume goes on from here"
    console.print(f"{done} ({took})")
    return 1 if any(row["status"] == "wrong" for row in results.rows) else 0


def _ops(arguments: argparse.Namespace) -> list[str]:
    names = arguments.op or list(OPS)
    return [op for name in names for op in ALIASES.get(name, (name,))]


def _cases(arguments: argparse.Namespace) -> tuple[str, list[AnyCase]]:
    """Name and cases of what is to be measured."""
    ops = _ops(arguments)
    if arguments.shapes and ops == ["search"]:
        return "custom", [parse_instance(text) for text in arguments.shapes]
    if arguments.shapes:
        attention = [op for op in ops if op != "search"]
        shapes = [parse_shape(op, text) for op in attention for text in arguments.shapes]
        cases = vary(shapes, arguments.maps or ["even"], arguments.dtype or ["bfloat16"])
        kinds = arguments.caches or ["dense"]
        return "custom", [one for case in cases for one in (
            [replace(case, cache=kind) for kind in kinds] if case.op in CACHE_OPS else [case]
        )]  # fmt: skip
    suite = "quick" if arguments.quick else arguments.suite or "quick"
    cases = [case for case in SUITES[suite] if case.op in ops]
    if arguments.maps:
        cases = [case for case in cases if _matches(case.map, arguments.maps)]
    if arguments.caches:
        cases = [case for case in cases if case.cache in arguments.caches]
    if arguments.dtype:
        cases = [case for case in cases if case.dtype in arguments.dtype]
    if not cases:
        raise ValueError(f"--op, --maps and --dtype must leave cases of suite {suite}, got none")
    return suite, cases


def _contestants(
    arguments: argparse.Namespace, suite: str, device: torch.device, ops: set[str]
) -> tuple[dict[str, list[Contestant]], dict[str, str]]:
    """Per op the usable contestants asked for; for every one asked for, whether it is usable."""
    chosen: dict[str, list[Contestant]] = {}
    reasons: dict[str, str] = {}
    without = SUITE_WITHOUT.get(suite, [])
    backends, peers = arguments.backend, arguments.peer
    if peers is None:
        peers = SUITE_PEERS.get(suite, ["*"])
    elif peers == ["none"]:
        peers = []
    known = [OPS[name] for name in OPS if name in ops]
    _refuse_unknown("backend", {name for op in known for name in op.backends()}, backends)
    _refuse_unknown("peer", {name for op in known for name in op.peers()}, peers)
    for name in OPS:
        if name not in ops:
            continue
        op = OPS[name]
        ours = _chosen(op.backends(), backends, [NOT_BY_DEFAULT])
        controls = [control for contestant in ours if (control := contestant.control())]
        controls = [control for control in controls if not _matches(control.name, without)]
        chosen[name] = []
        for contestant in ours + controls + _chosen(op.peers(), peers, without):
            reason = contestant.unavailable_reason(device)
            reasons[contestant.name] = reason or "available"
            if reason is None:
                chosen[name].append(contestant)
            elif contestant.name in (*arguments.backend, *(arguments.peer or [])):
                raise ValueError(f"{contestant.name} is not usable here: {reason}")
    return chosen, reasons


def _refuse_unknown(what: str, known: set[str], patterns: list[str]) -> None:
    for pattern in patterns:
        if pattern != "*" and not fnmatch.filter(known, pattern):
            raise ValueError(f"--{what} must be among {', '.join(sorted(known))}, got {pattern!r}")


def _chosen(
    known: dict[str, Contestant], patterns: list[str], without: list[str]
) -> list[Contestant]:
    names = [name for name in known if _matches(name, patterns)]
    return [known[name] for name in names if name in patterns or not _matches(name, without)]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _settings(arguments: argparse.Namespace, device: torch.device) -> Settings:
    if arguments.seconds is not None:
        return Settings(seconds=arguments.seconds)
    if arguments.quick:
        return Settings().quick()
    return Settings(seconds=DEVICE_SECONDS[device.type])


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _compare(paths: list[Path], console: Console) -> int:
    before, after = (Results.load(path) for path in paths)
    changes = compare(before.rows, after.rows)
    display.show_changes(console, before.header, after.header, changes)
    return 1 if any(change.regressed for change in changes) else 0


def _bars(console: Console) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()]
    return Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
