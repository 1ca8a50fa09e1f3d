"""Every search method on the same matrices: objective, share of the attainable gain left, time.

    python -m benchmarks.studies.search                          # five families, four sizes
    python -m benchmarks.studies.search --real --json out.json --markdown out.md
    python -m benchmarks.studies.search --heads 128 --groups 32 --sizes equal --methods exact
    python -m benchmarks.studies.search --matrix layer0_k.npy --groups 4 --json layer0.json

The gain that can be had is the mean objective of random balanced partitions less the optimum; a
method's share left is what it misses of it. Where the optimum isn't proved the best partition found
stands in for it, and the heading says so. CPU seconds are the process's own, of all its threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from gqa_kernels.grouping import search
from gqa_kernels.grouping.result import Sizes
from gqa_kernels.reporting.device import device_name
from gqa_kernels.reporting.files import write_atomically

from ..data.instances import FAMILIES, instance
from ..ops.search import RUNS, mean_random_objective
from ..report.results import commit

CASES: tuple[tuple[int, int, Sizes], ...] = (
    (16, 4, "free"),
    (32, 8, "equal"),
    (32, 8, (1, 6)),
    (64, 16, "equal"),
)
# Keys of real models, heads of several layers pooled: model, similarity, H, G, sizes
REAL_CASES: tuple[tuple[str, str, int, int, Sizes], ...] = (
    ("minilm", "activation_moment", 32, 8, "equal"),
    ("minilm", "aligned_cosine", 32, 8, "equal"),
    ("minilm", "aligned", 32, 8, (1, 6)),
    ("minilm", "aligned_cosine", 64, 16, "equal"),
    ("smollm2", "aligned_cosine", 32, 8, "equal"),
    ("smollm2", "aligned", 32, 8, (1, 6)),
    ("smollm2", "aligned_cosine", 64, 16, "equal"),
)
REAL_TEXTS = 16


@dataclass(frozen=True)
class Row:
    """One method on one matrix. ``gap_left`` is the share, from 0, of random-to-optimum left."""

    instance: str
    method: str
    objective: float
    lower_bound: float
    proved: bool
    gap_left: float
    seconds: float
    cpu_seconds: float


def compare(
    name: str,
    D: np.ndarray,
    groups: int,
    sizes: Sizes,
    seed: int,
    time_limit: float | None,
    methods: Sequence[str] = tuple(RUNS),
) -> list[Row]:
    """Methods on one matrix; NSGA-II is left out if pymoo is missing."""
    random = mean_random_objective(D, groups, sizes)
    measured = []
    for label in methods:
        method, options = RUNS[label]
        if method == "nsga2" and importlib.util.find_spec("pymoo") is None:
            continue
        started = time.process_time()
        result = search(D, groups, method, sizes, seed, time_limit, **options)
        measured.append((label, result, time.process_time() - started))
    best = min(result.objective for _, result, _ in measured)
    gain = random - best
    return [
        Row(
            instance=name,
            method=label,
            objective=result.objective,
            lower_bound=result.lower_bound,
            proved=result.proved,
            gap_left=(result.objective - best) / gain if gain > 0 else 0.0,
            seconds=result.seconds,
            cpu_seconds=cpu,
        )
        for label, result, cpu in measured
    ]


def table(rows: list[Row]) -> str:
    """Markdown table of one instance."""
    proved = "optimum proved" if any(row.proved for row in rows) else "optimum NOT proved"
    lines = [
        f"### {rows[0].instance} ({proved})",
        "",
        "| method | objective | gap left | seconds | CPU s |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.method} | {row.objective:.5g} | {row.gap_left:.1%} "
            f"| {row.seconds:.2f} | {row.cpu_seconds:.2f} |"
        )
    return "\n".join([*lines, ""])


def summary(rows: list[Row]) -> str:
    """Gap left of every method (rows) on every instance (columns)."""
    names = list(dict.fromkeys(row.instance for row in rows))
    cells = {(row.method, row.instance): f"{row.gap_left:.1%}" for row in rows}
    methods = dict.fromkeys(row.method for row in rows)
    lines = ["| gap left | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(cells[method, n] for n in names) + " |")
    return "\n".join(lines)


def parse_sizes(text: str) -> Sizes:
    """``free``, ``equal`` or ``lo,hi``."""
    return tuple(int(part) for part in text.split(",")) if "," in text else text


def real_matrices() -> Iterator[tuple[str, np.ndarray, int, Sizes]]:
    """Needs the packages of :mod:`.real_models`."""
    from . import real_models

    loaded = {}
    for model, kind, heads, groups, sizes in REAL_CASES:
        if model not in loaded:
            each = getattr(real_models, model)()
            loaded[model] = each, real_models.texts(each, REAL_TEXTS, 0, 0)[0]
        D = real_models.pooled_distances(*loaded[model], heads, kind)
        name = f"{loaded[model][0].name} keys, {kind}"
        yield f"{name} {_case(heads, groups, sizes)}", D, groups, sizes


def matrices(args: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, int, Sizes]]:
    if args.real:
        yield from real_matrices()
        return
    if args.matrix:
        for path in args.matrix:
            D = np.load(path)
            yield (
                f"{path.stem} {_case(len(D), args.groups, args.sizes)}",
                D,
                args.groups,
                args.sizes,
            )
        return
    cases = [(args.heads, args.groups, args.sizes)] if args.heads else CASES
    for heads, groups, sizes in cases:
        for family in args.families:
            D = instance(family, heads, args.seed)
            yield f"{family} {_case(heads, groups, sizes)}", D, groups, sizes


def _case(heads: int, groups: int, sizes: Sizes) -> str:
    return f"H={heads} G={groups} {sizes if isinstance(sizes, str) else '{}..{}'.format(*sizes)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, help="heads of the generated matrices")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--sizes", type=parse_sizes, default="free", help="free, equal or lo,hi")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--real", action="store_true", help="heads of MiniLM and SmolLM2")
    parser.add_argument("--matrix", nargs="+", type=Path, help=".npy dissimilarities [H, H]")
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, help="seconds for each method")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args()
    rows: list[Row] = []
    tables: list[str] = []
    for name, D, groups, sizes in matrices(args):
        found = compare(name, D, groups, sizes, args.seed, args.time_limit, args.methods)
        tables.append(table(found))
        print(tables[-1], flush=True)
        rows += found
    print(summary(rows))
    about = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": {name: _version(name) for name in ("numpy", "scipy", "pymoo")},
        "seed": args.seed,
    }
    if args.json:
        report = {**about, "rows": [asdict(row) for row in rows]}
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    if args.markdown:
        note = f"{about['device']}, {about['threads']} threads, commit {about['commit']}."
        parts = ["# Search methods on the same matrices", note, summary(rows), *tables]
        write_atomically(args.markdown, "\n\n".join(parts))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
