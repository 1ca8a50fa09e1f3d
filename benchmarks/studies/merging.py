"""Held-out attention-output error of MiniLM's layers with fewer KV heads, by grouping and merging.

    python -m benchmarks.studies.merging --json out.json --markdown out.md --figure out.svg

Each layer is converted apart and given its usual inputs; the error is the mean squared change of
its attention output over that output's variance (``layer_errors``), averaged over the layers. Maps
of K and V are searched apart. Moments, choices and reported errors come from three texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, select_maps
from gqa_kernels.grouping import calibrate, layer_errors, search
from gqa_kernels.grouping.moments import LayerStats
from gqa_kernels.grouping.similarity import layer_similarity
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers, layer_weights
from gqa_kernels.reporting.device import device_name
from gqa_kernels.reporting.files import write_atomically
from gqa_kernels.reporting.progress import track

from ..report.results import commit, versions
from .real_models import Loaded, minilm, texts

GROUPS = (6, 4, 3)
UNEVEN = (1, 6)
TEXTS = (64, 8, 16)  # to calibrate on, to choose by, to report on


@dataclass(frozen=True)
class Method:
    """One row: how groups are found and merged.

    Attributes:
        name: of the row.
        search: method of ``search``; None for a choice among ``AMONG``, layer by layer.
        kind: similarity it works on.
        sizes: rule for the group sizes.
        merging: method of ``convert``.
    """

    name: str
    search: str | None
    kind: str
    sizes: str | tuple[int, int]
    merging: str


METHODS = (
    Method("neighbours (GQA)", "neighbour", "weight", "equal", "mean"),
    Method("AsymGQA search, 10 steps", "asymgqa", "activation", "equal", "mean"),
    Method("exact, activation cosine", "exact", "activation", "equal", "mean"),
    Method("exact, weight-sharing error", "exact", "weight_sharing_error", UNEVEN, "mean"),
    Method("exact, functional, not aligned", "exact", "functional_raw", UNEVEN, "mean"),
    Method("neighbours", "neighbour", "weight", "equal", "aligned"),
    Method("exact, aligned cosine", "exact", "aligned_cosine", "equal", "aligned"),
    Method("exact, aligned", "exact", "aligned", "equal", "aligned"),
    Method("exact, aligned", "exact", "aligned", UNEVEN, "aligned"),
    Method("exact, functional", "exact", "functional", "equal", "aligned"),
    Method("exact, functional", "exact", "functional", UNEVEN, "aligned"),
    Method("best of even and uneven, by layer", None, "", UNEVEN, "aligned"),
    Method("neighbours", "neighbour", "weight", "equal", "low_rank"),
    Method("exact, aligned", "exact", "aligned", "equal", "low_rank"),
    Method("exact, aligned", "exact", "aligned", UNEVEN, "low_rank"),
    Method("exact, low rank", "exact", "low_rank", "equal", "low_rank"),
    Method("exact, low rank", "exact", "low_rank", UNEVEN, "low_rank"),
    Method("best of even and uneven, by layer", None, "", UNEVEN, "low_rank"),
)
AMONG = (("aligned", "equal"), ("aligned", UNEVEN), ("functional", UNEVEN))


@dataclass(frozen=True)
class Row:
    """One method at one number of KV heads.

    Attributes:
        errors: ``[L]`` held-out error of each layer.
        even: ``[L]`` whether K's and V's groups are of one size.
        chosen: ``[L]`` what a choice by layer took.
    """

    method: str
    sizes: str
    merging: str
    kv_heads: int
    error: float
    errors: list[float]
    even: list[bool]
    chosen: list[str] | None = None


class Bench:
    """The model, its three texts and the matrices searched so far."""

    def __init__(self, loaded: Loaded):
        register()
        self.model: nn.Module = loaded.model
        calibration, self.selection, self.test = texts(loaded, *TEXTS)
        self.stats: list[LayerStats] = calibrate(self.model, calibration)
        self.layers = [layer_weights(layer) for layer in attention_layers(self.model)]
        self.distances = cache(self._distances)

    def _distances(self, layer: int, side: str, kind: str):
        return layer_similarity(self.layers[layer], self.stats[layer], side, kind)

    def maps(self, method: str, kind: str, sizes, groups: int) -> list[tuple[HeadMap, HeadMap]]:
        """Of all layers, K and V apart."""
        return [
            tuple(
                search(self.distances(layer, side, kind), groups, method, sizes).head_map
                for side in ("k", "v")
            )
            for layer in range(len(self.layers))
        ]

    def row(self, method: Method, groups: int) -> Row:
        norms, chosen = False, None
        if method.search is None:
            found = select_maps(
                self.model,
                {
                    f"{kind}, {_sizes(sizes)}": self.maps("exact", kind, sizes, groups)
                    for kind, sizes in AMONG
                },
                self.selection,
                method.merging,
                moments=self.stats,
            )
            maps, norms, chosen = found.maps, list(found.restore_norms), list(found.names)
        else:
            maps = self.maps(method.search, method.kind, method.sizes, groups)
        child = convert(self.model, maps, method.merging, moments=self.stats, restore_norms=norms)
        child.set_attn_implementation("asym_gqa")
        errors = layer_errors(self.model, child, self.test)
        return Row(
            method=method.name,
            sizes="choice" if method.search is None else _sizes(method.sizes),
            merging=method.merging,
            kv_heads=groups,
            error=sum(errors) / len(errors),
            errors=errors,
            even=[len(set(k.group_sizes)) == len(set(v.group_sizes)) == 1 for k, v in maps],
            chosen=chosen,
        )


def _sizes(sizes) -> str:
    return "even" if sizes == "equal" else "uneven"


def table(rows: Sequence[Row]) -> str:
    """Markdown: methods down, numbers of KV heads across."""
    counts = list(dict.fromkeys(row.kv_heads for row in rows))
    cells = {(r.method, r.sizes, r.merging, r.kv_heads): r.error for r in rows}
    lines = [
        "| groups | sizes | merging | " + " | ".join(f"{c} of 12" for c in counts) + " |",
        "|---|---|---|" + "--:|" * len(counts),
    ]
    for name, sizes, merging in dict.fromkeys(key[:3] for key in cells):
        errors = " | ".join(f"{cells[name, sizes, merging, c]:.3f}" for c in counts)
        lines.append(f"| {name} | {sizes} | {merging} | {errors} |")
    return "\n".join(lines) + "\n"


def findings(rows: Sequence[Row]) -> str:
    """What the table says about the two claims of the package, in numbers."""
    lines = []
    for count in dict.fromkeys(row.kv_heads for row in rows):
        here = [row for row in rows if row.kv_heads == count]
        neighbour = here[0].error
        aligned = min(r.error for r in here if r.merging == "aligned" and "exact" in r.method)
        low_rank = min(r.error for r in here if r.merging == "low_rank")
        lines.append(
            f"- {count} KV heads: the best exact + aligned is {neighbour / aligned:.2f}x below "
            f"neighbour mean pooling, the best low-rank {neighbour / low_rank:.2f}x."
        )
        for merging in ("aligned", "low_rank"):
            exact = [r for r in here if r.merging == merging and r.method == "exact, aligned"]
            even = next(r for r in exact if r.sizes == "even")
            choice = next(r for r in here if r.merging == merging and r.sizes == "choice")
            uneven = sum(not each for each in choice.even)
            lines.append(
                f"  {merging}: chosen by layer {choice.error:.3f} (uneven in {uneven} of "
                f"{len(choice.even)} layers), even everywhere {even.error:.3f}."
            )
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], path: Path) -> None:
    from gqa_kernels.reporting.plots import lines

    names = {
        ("neighbours (GQA)", "even", "mean"): "neighbours, mean (GQA)",
        ("exact, activation cosine", "even", "mean"): "exact, raw similarity, mean",
        ("neighbours", "even", "aligned"): "neighbours, aligned",
        ("exact, aligned", "even", "aligned"): "exact, aligned",
        ("best of even and uneven, by layer", "choice", "aligned"): "chosen by layer, aligned",
        ("best of even and uneven, by layer", "choice", "low_rank"): "chosen by layer, low rank",
    }
    curves = {
        label: {r.kv_heads: r.error for r in rows if (r.method, r.sizes, r.merging) == key}
        for key, label in names.items()
    }
    lines(curves, "KV heads of 12", "held-out attention-output error", path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--figure", type=Path, help="write a picture here")
    args = parser.parse_args()
    bench = Bench(minilm())
    jobs = [(method, groups) for groups in args.groups for method in METHODS]
    rows = []
    for method, groups in track(jobs, "Converting"):
        rows.append(bench.row(method, groups))
        print(f"{method.name}, {rows[-1].sizes}, {groups}: {rows[-1].error:.4f}", flush=True)
    text = table(rows) + "\n" + findings(rows)
    print(text)
    if args.json:
        about = {
            "device": device_name(torch.device("cpu")),
            "commit": commit(),
            "versions": versions(),
            "model": "MiniLM-L6",
            "texts": TEXTS,
        }
        report = {**about, "rows": [asdict(row) for row in rows]}
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    if args.markdown:
        heading = "# MiniLM: held-out attention-output error with fewer KV heads\n\n"
        note = f"`python -m benchmarks.studies.merging`, commit {commit()}.\n\n"
        write_atomically(args.markdown, heading + note + text)
    if args.figure:
        figure(rows, args.figure)


if __name__ == "__main__":
    main()
