"""Figures of a device's results: what each shows, as data, and how it is drawn.

A figure carries the digest of its data, so that a stale one is known without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..data.models import MILD, SKEWED
from ..data.suites import BOTH, HEADLINE
from .results import Results
from .tables import EMULATIONS, CaseRows, by_case, fits

SHOWN = ("expanded-sdpa", "expand+sdpa", "gqa-sdpa", "flex", "fa3-gqa", *EMULATIONS)


@dataclass(frozen=True)
class Figure:
    """Lines (or points) over labelled axes.

    Attributes:
        series: by label, (x, y) pairs.
        guides: by label, (x, y) pairs drawn as dashed lines: the machine's limits.
        joined: draw lines between points.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    guides: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    log_y: bool = False
    joined: bool = True

    @property
    def file(self) -> str:
        return f"{self.name}.svg"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def figures(results: Results, suites: Iterable[Results] = ()) -> list[Figure]:
    """Those that the results have data for.

    Args:
        results: those that represent the device.
        suites: all of its results, for the fits.
    """
    cases = by_case(results)
    made = (
        _roofline(results, cases), _bandwidth(results, cases), _groups(cases), _skew(cases),
        _scaling(suites),
    )  # fmt: skip
    return [figure for figure in made if any(len(line) > 1 for line in figure.series.values())]


def is_current(figure: Figure, folder: Path) -> bool:
    path = folder / figure.file
    return path.exists() and figure.digest in path.read_text(encoding="utf-8")


def draw(figure: Figure, folder: Path) -> None:
    """Write ``folder / figure.file``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter

    style = {"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(style):
        plot, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        for label, points in figure.guides.items():
            axes.plot(*zip(*sorted(points), strict=True), "--", color="0.5", lw=1, label=label)
        for label, points in figure.series.items():
            ours = label.startswith("ours")
            axes.plot(
                *zip(*sorted(points), strict=True), "o-" if figure.joined else "o", ms=4,
                lw=2 if ours else 1, alpha=1 if ours else 0.75, zorder=3 if ours else 2,
                label=label,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        if figure.log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        plot.savefig(
            folder / figure.file, metadata={"Date": None, "Description": f"data {figure.digest}"}
        )
        plt.close(plot)


def _roofline(results: Results, cases: list[CaseRows]) -> Figure:
    series: dict[str, list[tuple[float, float]]] = {}
    for c in cases:
        if (ours := c.ours) and ours.get("flops"):
            point = (ours["flops"] / ours["bytes"], 1e3 * ours["tflops"])
            series.setdefault(f"ours {c.case['op']} {c.case['dtype']}", []).append(point)
    guides = {}
    limits = results.header.get("limits")
    points = [x for line in series.values() for x, _ in line]
    if limits and points and limits["memory"]:
        rate = limits["memory"][-1]["rate"]
        names: dict[float, list[str]] = {}
        for name, compute in limits["compute"].items():
            if any(label.endswith(name) for label in series):
                names.setdefault(compute, []).append(name)
        for compute, types in names.items():
            knee = compute / rate
            ends = sorted({min(*points, knee), knee, max(*points, 2 * knee)})
            line = [(x, min(x * rate, compute) / 1e9) for x in ends]
            guides[f"limit {', '.join(types)}"] = line
    return Figure(
        "roofline", "Roofline", "operations per byte", "GFLOP/s", series, guides, log_y=True,
        joined=False,
    )  # fmt: skip


def _bandwidth(results: Results, cases: list[CaseRows]) -> Figure:
    def at(c: CaseRows) -> float:
        return c.case["kv_len"]

    chosen = [
        c
        for c in _plain(cases, "decode", HEADLINE, BOTH)
        if c.case["batch"] == 1 and c.case["dtype"] == "bfloat16"
    ]
    series = {}
    for name, label in (("even", "even"), (SKEWED, "uneven")):
        of_map = [c for c in chosen if c.case["map"] == name]
        for contestant, points in _lines(of_map, at, lambda row: row["gbytes_per_second"]).items():
            if contestant == "ours" or contestant in SHOWN[:4]:
                series[f"{contestant}, {label}"] = points
    guides = {}
    limit = [
        (at(c), c.ours["bytes"] / c.ours["limit_seconds"] / 1e9)
        for c in chosen
        if c.ours and c.case["map"] == "even" and c.ours["bound_by"] == "memory"
    ]
    if len(limit) > 1:
        guides["streaming read"] = limit
    return Figure(
        "bandwidth", f"Decode, {HEADLINE}, bf16, batch 1: K and V read once, by time", "keys",
        "GB/s", series, guides,
    )  # fmt: skip


def _groups(cases: list[CaseRows]) -> Figure:
    chosen = [c for c in _plain(cases, "decode", "llama-2-7b", None) if c.ours]
    series = {}
    for name in ("expand+sdpa", "expanded-sdpa", "sdpa-rows", "sdpa-padded", "sdpa-per-size"):
        points = [
            (c.case["num_heads"] / c.case["num_kv_heads"], row["median"] / c.ours["median"])
            for c in chosen
            if (row := c.rows.get(name)) and row["status"] == "ok"
        ]
        if points:
            series[name] = points
    return Figure(
        "groups", "Decode, llama-2-7b, uneven maps: time over ours", "query heads per KV head",
        "times ours", series, {"ours": [(1, 1), (6.4, 1)]} if series else {},
    )  # fmt: skip


def _skew(cases: list[CaseRows]) -> Figure:
    maps = ("even", MILD, SKEWED, "giant")
    chosen = [c for c in _plain(cases, "decode", HEADLINE, maps) if c.case["dtype"] == "bfloat16"]
    shapes = [(c.case["batch"], c.case["kv_len"]) for c in chosen]
    widest = max(shapes, key=lambda s: (shapes.count(s), s), default=None)
    chosen = [c for c in chosen if (c.case["batch"], c.case["kv_len"]) == widest]
    lines = _lines(chosen, lambda c: max(c.case["group_sizes"]), lambda row: 1e6 * row["median"])
    shown = ("ours", "expand+sdpa", "expanded-sdpa", *EMULATIONS)
    where = f", batch {widest[0]}, {widest[1]} keys" if widest else ""
    return Figure(
        "skew", f"Decode, {HEADLINE}{where}: 32 query heads over 8 KV heads",
        "query heads in the largest group", "microseconds",
        {name: line for name, line in lines.items() if name in shown}, log_y=True,
    )  # fmt: skip


def _scaling(suites: Iterable[Results]) -> Figure:
    series: dict[str, list[tuple[float, float]]] = {}
    for results in suites:
        if results.header["suite"].startswith("scaling"):
            for (axis, backend), fitted in fits(results).items():
                (first, shortest), *_ = fitted.points
                label = f"{axis} ({backend}): x^{fitted.exponent:.2f}"
                series[label] = [(x / first, t / shortest) for x, t in fitted.points]
    widest = max((x for line in series.values() for x, _ in line), default=1)
    return Figure(
        "scaling", "Growth of the time along one axis at a time", "times the smallest value",
        "times the time there", series, {"in proportion": [(1, 1), (widest, widest)]},
        log_y=True,
    )  # fmt: skip


def _plain(
    cases: list[CaseRows], op: str, model: str, maps: tuple[str, ...] | None
) -> list[CaseRows]:
    """Cases of an op and a model, warm and without a window."""
    return [
        c
        for c in cases
        if (c.case["op"], c.case["model"]) == (op, model)
        and not c.case["cold"]
        and c.case["window"] is None
        and (maps is None or c.case["map"] in maps)
    ]


def _lines(
    cases: list[CaseRows], x: Callable[[CaseRows], float], y: Callable[[dict], float]
) -> dict[str, list[tuple[float, float]]]:
    """By contestant (``"ours"`` first), its points."""
    lines: dict[str, list[tuple[float, float]]] = {"ours": []}
    for c in cases:
        if c.ours:
            lines["ours"].append((x(c), y(c.ours)))
        for name, row in c.rows.items():
            if row["kind"] == "peer" and row["status"] == "ok":
                lines.setdefault(name, []).append((x(c), y(row)))
    return {name: points for name, points in lines.items() if points}
