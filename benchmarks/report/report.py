"""Writes the reports, figures, and the blocks of results in the documentation and the README.

``python -m benchmarks.report`` writes; with ``--check`` it changes nothing and fails where a file
is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.suites import is_headline, is_in_readme
from . import display, engine, tables
from .figures import Figure, draw, figures, is_current
from .results import FOLDER, Results

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SUITE_ORDER = ("gpu", "cpu", "quick")  # the first that a device has represents it
SCALING = ("scaling", "scaling-gpu")  # whose cases stand in one table of fits
README_FIGURE = "skew"
README_LEAVES_OUT = ("rate", "/ even map", "/ dense cache", "KV bytes per token")
MEMORY = "memory"  # results without times
OTHER_RESULTS = (
    "formats",
    "generate",
    "grouping",
    "recovery",
    "train-demo",
)  # they have their own reports
TITLES = {
    "decode": "Decode",
    "prefill": "Prefill",
    "backward": "Backward",
    "decode-cache": "Decode over a KV cache",
    "append": "Append to a KV cache",
    "first-token": "First token, whole model",
    "generate": "Generation, whole model",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="a few rows")
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the headline cases"
    )
    arguments = parser.parse_args(argv)
    devices = load_all(arguments.results)
    if arguments.check:
        stale = find_stale(devices, arguments.results, arguments.readme, arguments.page)
        for name in stale:
            print(f"{name} is stale: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    write(devices, arguments.results, arguments.readme, arguments.page)
    return 0


def load_all(folder: Path) -> dict[str, dict[str, Results]]:
    """By device folder and suite, what was timed."""
    found: dict[str, dict[str, Results]] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name in OTHER_RESULTS or path.stem == MEMORY:
            continue
        found.setdefault(path.parent.name, {})[path.stem] = Results.load(path)
    return found


def load_memory(folder: Path) -> Results | None:
    """Of a device's folder."""
    path = folder / f"{MEMORY}.json"
    return Results.load(path) if path.exists() else None


def write(devices: dict[str, dict[str, Results]], folder: Path, readme: Path, page: Path) -> None:
    for name, suites in devices.items():
        text = device_report(suites, load_memory(folder / name))
        (folder / name / "report.md").write_text(text, encoding="utf-8")
        drawn = figures(newest_suite(suites), suites.values())
        for figure in drawn:
            if not is_current(figure, folder / name):
                draw(figure, folder / name)
        for path in _orphans(drawn, folder / name):
            path.unlink()
    for path, made in ((readme, readme_block), (page, page_block)):
        text = with_block(path.read_text(encoding="utf-8"), made(devices, folder, path))
        path.write_text(text, encoding="utf-8")


def find_stale(
    devices: dict[str, dict[str, Results]], folder: Path, readme: Path, page: Path
) -> list[str]:
    """Files that :func:`write` would change."""
    stale = []
    for name, suites in devices.items():
        path, text = folder / name / "report.md", device_report(suites, load_memory(folder / name))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"{name}/{path.name}")
        drawn = figures(newest_suite(suites), suites.values())
        stale += [f"{name}/{f.file}" for f in drawn if not is_current(f, folder / name)]
        stale += [f"{name}/{path.name}" for path in _orphans(drawn, folder / name)]
    for path, made in ((readme, readme_block), (page, page_block)):
        text = path.read_text(encoding="utf-8")
        if devices and with_block(text, made(devices, folder, path)) != text:
            stale.append(path.name)
    return stale


def _orphans(drawn: Sequence[Figure], folder: Path) -> list[Path]:
    """Pictures in a device's folder that its results no longer make."""
    return sorted(set(folder.glob("*.svg")) - {folder / figure.file for figure in drawn})


def with_block(text: str, block: str) -> str:
    """A page with its block of results replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"a page must have one {BEGIN} and after it one {END}, got another count")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{block}{END}", text, flags=re.DOTALL)


def newest_suite(suites: dict[str, Results]) -> Results:
    """The results that represent a device: of its first suite in order, else any."""
    names = [name for name in SUITE_ORDER if name in suites] or sorted(suites)
    return suites[names[0]]


def readme_block(devices: dict[str, dict[str, Results]], folder: Path, readme: Path) -> str:
    """A few cases of each device, and one figure."""
    parts = []
    for name, suites in devices.items():
        results = newest_suite(suites)
        where = _relative(folder / name, readme.parent).as_posix()
        drawn = [f for f in figures(results, suites.values()) if f.name == README_FIGURE]
        parts += [f"![{f.title}]({where}/{f.file})" for f in drawn]
        table = tables.comparison(results, list(TITLES), is_in_readme, README_LEAVES_OUT)
        header = results.header
        parts.append(
            f"{header['device']}, {header['threads']} CPU threads, commit {header['commit']}. "
            "Peers' times are in multiples of ours; bold: faster than ours."
        )
        parts += [table, tables.score(results).split("\n")[0]] if table else []
    served = engine.load(folder)
    if served:  # one more item of the list
        parts[-1:] = ["\n".join([*parts[-1:], engine.line(served)])]
    return "".join(f"\n{part}\n" for part in parts if part) + "\n"


def page_block(devices: dict[str, dict[str, Results]], folder: Path, page: Path) -> str:
    """Headline tables of every device, and all of its figures."""
    parts = []
    for name, suites in devices.items():
        results = newest_suite(suites)
        where = _relative(folder / name, page.parent).as_posix()
        parts += [f"## {results.header['device']}", tables.provenance(results.header)]
        table = tables.comparison(results, list(TITLES), is_headline, ("KV bytes per token",))
        if table:
            parts.append("Peers' times are in multiples of ours; bold: faster than ours.")
            parts.append(table)
        parts.append(tables.score(results))
        memory = load_memory(folder / name)
        parts += [tables.peaks(memory)] if memory else []
        drawn = figures(results, suites.values())
        parts.append("\n\n".join(f"![{f.title}]({where}/{f.file})" for f in drawn))
        parts.append(f"[All cases]({where}/report.md)")
    served = engine.load(folder)
    if served:
        parts.append(engine.table(served))
    return "".join(f"\n{part}\n" for part in parts if part) + "\n"


def device_report(suites: dict[str, Results], memory: Results | None) -> str:
    """All cases of all suites of a device, and of its memory."""
    parts = [
        f"# {suites[next(iter(suites))].header['device']}",
        "Written by `python -m benchmarks.report` from the JSON files beside it. Columns: "
        "[`benchmarks/README.md`](../../README.md#columns). Peers' times are in multiples of ours "
        "(2.00x: the peer takes twice as long); bold: the peer is faster.",
    ]
    for suite, results in suites.items():
        parts += [f"## Suite {suite}", tables.provenance(results.header), tables.score(results)]
        for op, title in TITLES.items():
            table = tables.comparison(results, [op]) if suite not in SCALING else ""
            parts += [f"### {title}", table] if table else []
        for title, table in (
            ("Search", tables.searches(results)),
            ("Cost of a call", tables.overhead(results)),
            ("Scaling", tables.scaling(results) if suite in SCALING else ""),
        ):
            parts += [f"### {title}", table] if table else []
        refused = tables.refusals(results)
        parts += ["### Refused a timing", refused] if refused else []
        absent = display.absent(results.header)
        parts += ["### Not usable on this machine"] if absent else []
        parts.append(
            "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in absent.items())
        )
    if memory:
        parts += ["## Peak memory", tables.provenance(memory.header), tables.peaks(memory)]
    drawn = figures(newest_suite(suites), suites.values())
    parts += ["## Figures"] if drawn else []
    parts += [f"![{figure.title}]({figure.file})" for figure in drawn]
    return "\n\n".join(part for part in parts if part) + "\n"


def _relative(path: Path, start: Path) -> Path:
    return Path(os.path.relpath(path.resolve(), start.resolve()))


if __name__ == "__main__":
    sys.exit(main())
