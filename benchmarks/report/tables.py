"""Markdown tables of a results file: ours against every peer, wins and losses alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data.scaling import AXES, Fit, axis_points, fit
from .display import flops, of_limit, one_line, rate, seconds, size
from .results import Results, Row

EMULATIONS = (
    "sdpa-rows", "sdpa-padded", "sdpa-per-size", "varlen-rows", "fa3-rows", "fa3-batch-index",
    "fa4-rows", "flashinfer-rows",
)  # fmt: skip
COLUMNS: dict[str, tuple[str, ...]] = {  # heading -> contestants, of which the fastest counts
    "expand + SDPA": ("expand+sdpa*",),
    "SDPA, expanded cache": ("expanded-sdpa*",),
    "SDPA `enable_gqa`": ("gqa-sdpa*",),
    "FlexAttention": ("flex",),
    "vLLM `CPU_ATTN`": ("vllm-cpu",),
    "onnxruntime": ("onnxruntime",),
    "FlashAttention-3": ("fa3-expanded", "fa3-gqa"),
    "FlashAttention-4": ("fa4-expanded", "fa4-expand", "fa4-gqa"),
    "best emulation": EMULATIONS,
}
OURS_ORDER = ("cuda", "cpu", "triton", "reference")  # whose times count as ours, if measured


@dataclass(frozen=True)
class CaseRows:
    """All rows of one case."""

    case: dict
    rows: dict[str, Row]

    @property
    def ours(self) -> Row | None:
        timed = (self.rows.get(name, {}) for name in OURS_ORDER)
        return next((row for row in timed if row.get("status") == "ok"), None)

    def fastest(self, patterns: Sequence[str]) -> Row | None:
        """The fastest timed contestant whose name is given, or begins as given before a ``*``."""
        timed = [
            row
            for name, row in self.rows.items()
            if row["status"] == "ok"
            and any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)
        ]
        return min(timed, key=lambda row: row["median"], default=None)

    def statuses(self, patterns: Sequence[str]) -> set[str]:
        return {
            row["status"]
            for name, row in self.rows.items()
            if name in {p.rstrip("*") for p in patterns}
        }


def by_case(results: Results) -> list[CaseRows]:
    found: dict[str, CaseRows] = {}
    for row in results.rows:
        rows = found.setdefault(row["case_key"], CaseRows(row["case"], {}))
        rows.rows[row["contestant"]] = row
    return list(found.values())


def provenance(header: dict) -> str:
    """Device, threads, versions, commit and limits, in a line or two."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    driver = f", driver {header['driver']}" if header.get("driver") else ""
    took = f", {header['seconds'] / 60:.1f} minutes" if header.get("seconds") else ""
    about = (
        f"{header['device']}{driver}, {header['threads']} CPU threads; {versions}; "
        f"commit {header['commit']}; {header['date']}{took}."
    )
    limits = header.get("limits")
    if not limits or not limits["memory"]:
        return about
    memory = ", ".join(
        f"{entry['rate'] / 1e9:.1f} GB/s ({size(entry['bytes'])})"
        for entry in limits["memory"][-1:]
    )
    compute = ", ".join(f"{name} {flops(value)}" for name, value in limits["compute"].items())
    return f"{about} Limits measured in the run: memory {memory}; matrix product {compute}."


def comparison(
    results: Results,
    ops: Sequence[str],
    keep: Callable[[dict], bool] = lambda case: True,
    without: Sequence[str] = (),
) -> str:
    """Table of the cases of some ops: our time, and each peer's in multiples of it.

    Args:
        keep: which cases, from their facts.
        without: headings to leave out.

    Returns:
        Markdown, with the op's name before each case where there are several; empty if no rows.
    """
    cases = [c for op in ops for c in by_case(results) if c.case["op"] == op and keep(c.case)]
    columns = [
        name
        for name, patterns in COLUMNS.items()
        if any(c.fastest(patterns) or c.statuses(patterns) & {"wrong", "failed"} for c in cases)
    ]
    if not cases:
        return ""
    own = {
        name: cell
        for name, cell in OWN_COLUMNS.items()
        if name not in without and any(c.ours and cell(c, c.ours) for c in cases)
    }
    lines = [_line(["case", *own, *columns]), _line(["---"] + ["---:"] * (len(own) + len(columns)))]
    for c in cases:
        ours = c.ours
        cells = [cell(c, ours) if ours else "" for cell in own.values()]
        cells += [_peer_cell(c, ours, name) for name in columns]
        op = f"{c.case['op']}: " if len(ops) > 1 else ""
        lines.append(_line([op + describe(c.case), *cells]))
    return "\n".join(lines)


def _over(control: str) -> Callable[[CaseRows, Row], str]:
    def cell(c: CaseRows, ours: Row) -> str:
        easier = c.rows.get(f"{ours['contestant']}, {control}", {})
        return f"{ours['median'] / easier['median']:.2f}" if "median" in easier else ""

    return cell


# A column that is empty in all rows is left out.
OWN_COLUMNS: dict[str, Callable[[CaseRows, Row], str]] = {
    "ours": lambda c, ours: seconds(ours["median"]),
    "rate": lambda c, ours: rate(ours),
    "of limit": lambda c, ours: of_limit(ours),
    "/ even map": _over("even map"),
    "/ dense cache": _over("dense cache"),
    "KV bytes per token": lambda c, ours: str(ours.get("kv_bytes_per_token", "")),
}


def _peer_cell(c: CaseRows, ours: Row | None, column: str) -> str:
    peer = c.fastest(COLUMNS[column])
    if peer is None:
        statuses = c.statuses(COLUMNS[column])  # none: no peer of that kind for the op
        return ", ".join(sorted(statuses - {"unsupported"})) or ("n/a" if statuses else "")
    return times(peer["median"] / ours["median"]) if ours else seconds(peer["median"])


def times(ratio: float) -> str:
    """``2.3x``: the peer takes so many times as long; in bold where it is faster than ours."""
    text = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
    return f"**{text}**" if ratio < 1 else text


def describe(case: dict) -> str:
    parts = [f"{case['model']} {case['map']}", f"batch {case['batch']}"]
    parts.append(f"{case['kv_len']} keys")
    if case["op"] == "generate":
        parts.append(f"{case['q_len']} new tokens")
    elif case["q_len"] not in (1, case["kv_len"]):
        parts.append(f"{case['q_len']} queries")
    parts += [case["dtype"]]
    parts += [name for name in (case.get("cache"),) if name]
    parts += [f"{case[n]} {n}" for n in ("threads", "splits") if case.get(n)]
    parts += [f"window {case['window']}"] if case["window"] is not None else []
    return ", ".join(parts + (["cold"] if case["cold"] else []))


def score(results: Results) -> str:
    """Against each column, on how many cases ours is faster, and the median ratio."""
    lines = []
    cases = [c for c in by_case(results) if c.ours]
    for name, patterns in COLUMNS.items():
        ratios = sorted(
            peer["median"] / c.ours["median"] for c in cases if (peer := c.fastest(patterns))
        )
        if ratios:
            wins = sum(ratio > 1 for ratio in ratios)
            lines.append(
                f"- {name}: ours is faster on {wins} of {len(ratios)} cases, median "
                f"{ratios[len(ratios) // 2]:.2f}x (least {ratios[0]:.2f}x, most {ratios[-1]:.2f}x)."
            )
    return "\n".join(lines)


def searches(results: Results) -> str:
    """Table of the search op: by method and matrix its time and the share left of the gain.

    The gain is what the best partition found saves of the mean of random balanced ones.
    """
    cases = [c for c in by_case(results) if c.case["op"] == "search"]
    if not cases:
        return ""
    names = dict.fromkeys(name for c in cases for name in c.rows)
    heads = [f"{c.case['model']} H={c.case['heads']} G={c.case['groups']} {c.case['rule']}"
             for c in cases]  # fmt: skip
    lines = [_line(["method", *heads]), _line(["---"] + ["---:"] * len(heads))]
    lines += [_line([name, *(_search_cell(c, name) for c in cases)]) for name in names]
    return "\n".join(lines)


def _search_cell(c: CaseRows, name: str) -> str:
    row = c.rows.get(name, {"status": ""})
    if row["status"] != "ok":
        return "n/a" if row["status"] == "unsupported" else row["status"]
    best = min(r["objective"] for r in c.rows.values() if r["status"] == "ok")
    gain = row["random_objective"] - best
    left = (row["objective"] - best) / gain if gain > 0 else 0.0
    state = "proved optimal" if row["proved"] else f"{100 * left:.1f} % left"
    return f"{seconds(row['median'])}, {state}"


def overhead(results: Results) -> str:
    """Table of what calls cost beside their work, and over SDPA's call where there is one."""
    cases = [c for c in by_case(results) if c.case["op"] == "overhead"]
    lines = []
    for c in cases:
        sdpa = c.rows.get("SDPA")
        for name, row in c.rows.items():
            ratio = f"{row['median'] / sdpa['median']:.2f}" if sdpa else ""
            lines.append(_line([c.case["group"], name, seconds(row["median"]), ratio]))
    if not lines:
        return ""
    return "\n".join([_line(["", "call", "time", "/ SDPA"]), "| --- | --- | ---: | ---: |", *lines])


def scaling(results: Results) -> str:
    """Table of the fits along every axis, for each backend."""
    heads = ["axis", "backend", "range", "time", "power law", "R2", "line", "R2"]
    lines = []
    for (axis, backend), fitted in fits(results).items():
        (first, shortest), (last, longest) = fitted.points[0], fitted.points[-1]
        lines.append(
            _line(
                [
                    axis,
                    backend,
                    f"{first:g} to {last:g}",
                    f"{seconds(shortest)} to {seconds(longest)}",
                    f"x^{fitted.exponent:.2f}",
                    f"{fitted.power_r2:.3f}",
                    f"{seconds(fitted.fixed)} {'-' if fitted.slope < 0 else '+'} "
                    f"{seconds(abs(fitted.slope))} x",
                    f"{fitted.line_r2:.3f}",
                ]
            )
        )
    if not lines:
        return ""
    return "\n".join([_line(heads), _line(["---"] * 3 + ["---:"] * 5), *lines])


def fits(results: Results) -> dict[tuple[str, str], Fit]:
    """By axis and backend."""
    device = results.header["device_type"]
    backends = dict.fromkeys(r["contestant"] for r in results.rows if r["kind"] == "backend")
    found = {
        (axis, backend): fit(points)
        for backend in backends
        for axis, points in axis_points(
            (row for row in results.rows if row["contestant"] == backend), device
        ).items()
    }
    return dict(sorted(found.items(), key=lambda item: list(AXES).index(item[0][0])))


def peaks(results: Results) -> str:
    """Table of how far a training step's attention raises the peak of memory, and what K
    and V expanded to all query heads, and their gradients, take."""
    heads = ["ours", "expand + SDPA", "less", "K, V, dK, dV expanded"]
    lines = [_line(["peak memory of forward and backward", *heads]), _line(["---"] + ["---:"] * 4)]
    for c in by_case(results):
        ours, expanded = c.rows["cpu"], c.rows["expand+sdpa"]["peak_bytes"]
        sizes = [ours["peak_bytes"], expanded, expanded - ours["peak_bytes"]]
        lines.append(_line([describe(c.case), *map(size, [*sizes, ours["expanded_bytes"]])]))
    return "\n".join(lines)


def refusals(results: Results) -> str:
    """Contestants that were refused a timing or failed, with the reason."""
    return "\n".join(
        f"- {row['case_key']}: {row['contestant']} {row['status']}: {one_line(row['reason'])}"
        for row in results.rows
        if row["status"] in ("wrong", "failed")
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
