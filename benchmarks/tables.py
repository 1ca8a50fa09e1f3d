"""Markdown tables of a results file: ours against every peer, wins and losses alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cases import BOTH, HEADLINE, HEADLINE_LENGTHS, HEADLINE_TYPES
from .display import flops, of_limit, one_line, rate, seconds, size
from .harness import Row
from .results import Results

EMULATIONS = (
    "sdpa-rows", "sdpa-padded", "sdpa-per-size", "varlen-rows", "fa3-rows", "fa3-batch-index",
    "flashinfer-rows",
)  # fmt: skip
COLUMNS: dict[str, tuple[str, ...]] = {  # heading -> contestants, of which the fastest counts
    "expand + SDPA": ("expand+sdpa*",),
    "SDPA, expanded cache": ("expanded-sdpa*",),
    "SDPA `enable_gqa`": ("gqa-sdpa*",),
    "FlexAttention": ("flex",),
    "FlashAttention-3": ("fa3-expanded", "fa3-gqa"),
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
    limits = header.get("limits") or {"memory": [], "compute": {}}
    memory = ", ".join(
        f"{entry['rate'] / 1e9:.1f} GB/s ({size(entry['bytes'])})"
        for entry in limits["memory"][-1:]
    )
    compute = ", ".join(f"{name} {flops(value)}" for name, value in limits["compute"].items())
    return (
        f"{header['device']}{driver}, {header['threads']} CPU threads; {versions}; "
        f"commit {header['commit']}; {header['date']}. "
        f"Limits measured in the run: memory {memory}; matrix product {compute}."
    )


def is_headline(case: dict) -> bool:
    """Whether a case belongs into the README."""
    return (
        case["model"] == HEADLINE
        and case["map"] in BOTH
        and case["dtype"] in HEADLINE_TYPES
        and not case["cold"]
        and case["window"] is None
        and case["kv_len"] in HEADLINE_LENGTHS.get(case["op"], ())
    )


def comparison(results: Results, op: str, keep: Callable[[dict], bool] = lambda case: True) -> str:
    """Table of an op's cases: our time, and each peer's in multiples of it; empty if no rows."""
    cases = [c for c in by_case(results) if c.case["op"] == op and keep(c.case)]
    columns = [
        name
        for name, patterns in COLUMNS.items()
        if any(c.fastest(patterns) or c.statuses(patterns) & {"wrong", "failed"} for c in cases)
    ]
    if not cases:
        return ""
    own = dict(OWN_COLUMNS)
    for name in OWN_OPTIONAL:
        if not any(c.ours and own[name](c, c.ours) for c in cases):
            del own[name]
    lines = [_line(["case", *own, *columns]), _line(["---"] + ["---:"] * (len(own) + len(columns)))]
    for c in cases:
        ours = c.ours
        cells = [cell(c, ours) if ours else "" for cell in own.values()]
        cells += [_peer_cell(c, ours, name) for name in columns]
        lines.append(_line([describe(c.case), *cells]))
    return "\n".join(lines)


def _over_even(c: CaseRows, ours: Row) -> str:
    even = c.rows.get(f"{ours['contestant']}, even map", {})
    return f"{ours['median'] / even['median']:.2f}" if "median" in even else ""


OWN_COLUMNS: dict[str, Callable[[CaseRows, Row], str]] = {
    "ours": lambda c, ours: seconds(ours["median"]),
    "rate": lambda c, ours: rate(ours),
    "of limit": lambda c, ours: of_limit(ours),
    "/ even map": _over_even,
    "KV bytes per token": lambda c, ours: str(ours.get("kv_bytes_per_token", "")),
}
OWN_OPTIONAL = ("of limit", "/ even map", "KV bytes per token")  # left out where all are empty


def _peer_cell(c: CaseRows, ours: Row | None, column: str) -> str:
    peer = c.fastest(COLUMNS[column])
    if peer is None:
        return ", ".join(sorted(c.statuses(COLUMNS[column]) - {"unsupported"})) or "n/a"
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
    elif case["op"] != "decode" and case["q_len"] != case["kv_len"]:
        parts.append(f"{case['q_len']} queries")
    parts += [case["dtype"]]
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


def refusals(results: Results) -> str:
    """Contestants that were refused a timing or failed, with the reason."""
    return "\n".join(
        f"- {row['case_key']}: {row['contestant']} {row['status']}: {one_line(row['reason'])}"
        for row in results.rows
        if row["status"] in ("wrong", "failed")
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
