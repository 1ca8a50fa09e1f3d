"""What the harness prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..data.cases import CACHE_OPS
from ..data.models import MAPS, MODELS
from ..data.suites import SUITES, AnyCase
from ..measure.limits import Limits
from ..ops.registry import ALIASES, OPS
from .compare import Change
from .results import Row


def show_header(console: Console, header: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    console.print(f"{header['device']}, {header['threads']} threads, commit {header['commit']}")
    console.print(versions)
    for reason, names in absent(header).items():
        console.print(f"without {', '.join(names)}: {reason}", markup=False)


def absent(header: dict) -> dict[str, list[str]]:
    """Contestants that the machine can't run, by the reason."""
    found: dict[str, list[str]] = {}
    for name, reason in header["contestants"].items():
        if reason != "available":
            found.setdefault(one_line(reason), []).append(name)
    return found


def show_case(console: Console, case: AnyCase, rows: Sequence[Row]) -> None:
    table = Table(title=case.key, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("time", "spread", "rate", "of limit", "/ ours"):
        table.add_column(name, justify="right", no_wrap=True)
    ours = next((r for r in rows if r["kind"] == "backend" and r["status"] == "ok"), None)
    refused = []
    for row in rows:
        if row["status"] != "ok":
            refused.append(f"{row['contestant']} {row['status']}: {one_line(row['reason'])}")
            continue
        table.add_row(
            row["contestant"],
            seconds(row["median"]),
            f"{100 * (row['high'] - row['low']) / row['median']:.0f} %",
            rate(row),
            of_limit(row),
            f"{row['median'] / ours['median']:.2f}" if ours else "-",
        )
    console.print(table)
    for line in refused:
        console.print("  " + line, markup=False)


def show_limits(console: Console, limits: Limits) -> None:
    measured = limits.to_json()
    for entry in measured["memory"]:
        console.print(f"memory limit, {size(entry['bytes'])}: {entry['rate'] / 1e9:.1f} GB/s")
    for name, value in measured["compute"].items():
        console.print(f"matrix product, {name}: {flops(value)}")


def show_changes(console: Console, before: dict, after: dict, changes: Iterable[Change]) -> None:
    for name in ("device", "threads", "versions", "commit"):
        if before[name] != after[name]:
            console.print(f"{name} differs: {before[name]} -> {after[name]}", markup=False)
    table = Table()
    for name in ("case | contestant", "before", "after", "ratio", ""):
        table.add_column(name)
    for change in changes:
        table.add_row(
            change.key,
            seconds(change.before) if change.before else "-",
            seconds(change.after) if change.after else "-",
            f"{change.ratio:.3f}" if change.ratio else "-",
            change.mark,
        )
    console.print(table)


def show_list(console: Console, device: torch.device) -> None:
    console.print("models: " + ", ".join(MODELS), markup=False)
    for name, meaning in MAPS.items():
        console.print(f"map {name}: {meaning}", markup=False)
    for name, cases in SUITES.items():
        console.print(f"suite {name}: {len(cases)} cases")
    for name, ops in ALIASES.items():
        console.print(f"op {name}: {' and '.join(ops)}")
    for name, op in OPS.items():
        console.print(f"op {name}: {op.summary}")
        for contestant in (*op.backends().values(), *op.peers().values()):
            reason = contestant.unavailable_reason(device)
            state = f" [not usable: {one_line(reason)}]" if reason else ""
            console.print(
                f"  {contestant.kind} {contestant.name}: {contestant.summary}{state}",
                markup=False, highlight=False,
            )  # fmt: skip


def rate(row: Row) -> str:
    """GB/s of decode and appends, tokens/s of a whole model, operations/s of all else."""
    if "objective" in row:
        return f"objective {row['objective']:.5g}"
    if "bytes" not in row:
        return f"{row['tokens_per_second']:.1f} tokens/s"
    if row["case"]["op"] in ("decode", *CACHE_OPS):
        return f"{row['gbytes_per_second']:.1f} GB/s"
    return flops(row["tflops"] * 1e12)


def of_limit(row: Row) -> str:
    return f"{row['percent_of_limit']:.0f} %" if "percent_of_limit" in row else ""


def flops(value: float) -> str:
    """Operations per second, with up to three digits and a fitting unit."""
    if value < 1e12:
        return f"{value / 1e9:.3g} GFLOP/s"
    return f"{value / 1e12:.3g} TFLOP/s"


def seconds(value: float) -> str:
    """With three digits and a fitting unit."""
    unit, factor = next(
        (pair for pair in (("s", 1.0), ("ms", 1e3)) if value * pair[1] >= 1), ("us", 1e6)
    )
    return f"{value * factor:#.3g} {unit}".replace(". ", " ")


def size(count: float) -> str:
    """Bytes, binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} GiB"


def one_line(text: str) -> str:
    return " ".join(text.split())[:200]
