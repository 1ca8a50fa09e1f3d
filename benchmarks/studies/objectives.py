"""How well each objective of a search predicts the error of a converted layer.

    python -m benchmarks.studies.objectives mgm --out benchmarks/results/grouping
    python -m benchmarks.studies.objectives minilm --out benchmarks/results/grouping

The models are those of ``grouping``. In each layer random partitions of K and of V are merged, and
the error of the layer's output is measured on test texts. Spearman's correlation compares it with
the objectives, which are computed from other texts. Partitions into one number of groups differ
little in error, so the correlation also depends on how many texts are held out for the measured
loss: the table has several numbers.

Tables that are done are in the JSON file and are not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gqa_kernels import HeadMap
from gqa_kernels.convert.losses import MergeLosses, sample_attention
from gqa_kernels.grouping import calibrate
from gqa_kernels.grouping.low_rank import GroupLosses
from gqa_kernels.grouping.moments import LayerStats
from gqa_kernels.grouping.objective import objective
from gqa_kernels.grouping.similarity import layer_similarity
from gqa_kernels.grouping.space import HeadSpace
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers, layer_weights
from gqa_kernels.models.weights import LayerWeights
from gqa_kernels.reporting.device import device_name
from gqa_kernels.reporting.files import write_atomically

from ..report.results import commit, versions
from .grouping import COUNTS, MODELS, batches_of

TEXTS = {"mgm": (64, 512, 1024), "minilm": (32, 192, 160)}  # to calibrate, held out, to test
HELD_OUT = {"mgm": (64, 512), "minilm": (32, 192)}  # texts that losses are measured on
KINDS = ("weight", "activation", "cka", "aligned", "functional", "low_rank")
PARTITIONS = 16  # a layer
ANY = "any number of"
Maps = tuple[HeadMap, HeadMap]


class Bench:
    """A model, its moments and texts."""

    def __init__(self, name: str, folder: Path | None):
        register("asym_gqa", backend="reference")
        self.name = name
        self.model, texts = MODELS[name](folder, sum(TEXTS[name]))
        calibration, self.held_out, self.test = texts[: sum(TEXTS[name])].split(TEXTS[name])
        self.stats: list[LayerStats] = calibrate(self.model, batches_of(calibration))
        self.weights = [layer_weights(layer) for layer in attention_layers(self.model)]

    def table(self, counts: Sequence[int]) -> list[dict[str, float]]:
        """Per layer the correlation of each objective, and the spread of the errors over their
        mean. Numbers of groups are drawn from ``counts``."""
        rng = np.random.default_rng(0)
        heads = self.weights[0].num_heads
        drawn = [
            [
                tuple(_random(rng, heads, int(rng.choice(counts))) for _ in "kv")
                for _ in range(PARTITIONS)
            ]
            for _ in self.weights
        ]
        found: list[dict[str, np.ndarray]] = []
        for maps, weights, stats in zip(drawn, self.weights, self.stats, strict=True):
            objectives = _computed(weights, stats)
            found.append({n: np.array([v(*m) for m in maps]) for n, v in objectives.items()})
        few, many = HELD_OUT[self.name]
        apart, together = self.measured(drawn, self.held_out[:few], apart=True)
        more = self.measured(drawn, self.held_out[:many])[1]
        errors = self.measured(drawn, self.test)[1]
        return [
            {
                **{name: _spearman(values, true) for name, values in layer.items()},
                f"measured on {few} texts, K and V apart": _spearman(a, true),
                f"measured on {few} texts, together": _spearman(b, true),
                f"measured on {many} texts, together": _spearman(c, true),
                "spread": float(true.std() / true.mean()),
            }
            for layer, a, b, c, true in zip(found, apart, together, more, errors, strict=True)
        ]

    def measured(
        self, drawn: list[list[Maps]], texts: Tensor, apart: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Per layer the losses of its maps, of K and V apart (0 if not wanted) and together."""
        samples = sample_attention(self.model, batches_of(texts))
        sums, together = [], []
        for index, (maps, weights) in enumerate(zip(drawn, self.weights, strict=True)):
            sample, samples[index] = samples[index], None  # type: ignore[call-overload]
            loss = MergeLosses(weights, sample, self.stats[index], queries=texts.numel())
            together.append(np.array([loss.joint(*each) for each in maps]))
            sums.append(np.array([_apart(loss, *each) if apart else 0.0 for each in maps]))
        return sums, together


def _computed(
    weights: LayerWeights, stats: LayerStats
) -> dict[str, Callable[[HeadMap, HeadMap], float]]:
    """The objectives that need no held-out texts."""
    found: dict[str, Callable] = {}
    for kind in KINDS:
        D = [layer_similarity(weights, stats, side, kind) for side in "kv"]
        found[f"pairs, {kind}"] = partial(_pairs, D)
    moments = [GroupLosses(HeadSpace.of(weights, side, stats)) for side in "kv"]
    whole = [each(range(weights.num_heads)) for each in moments]
    found["groups, second moments"] = partial(_groups, moments, whole)
    return found


def _pairs(D: Sequence[np.ndarray], *maps: HeadMap) -> float:
    return sum(objective(d, m.entries) for d, m in zip(D, maps, strict=True))


def _groups(losses: Sequence[GroupLosses], whole: Sequence[float], *maps: HeadMap) -> float:
    return sum(
        loss(group) / scale
        for loss, scale, head_map in zip(losses, whole, maps, strict=True)
        for group in head_map.groups
    )


def _apart(losses: MergeLosses, *maps: HeadMap) -> float:
    return sum(
        losses(side, group)
        for side, head_map in zip("kv", maps, strict=True)
        for group in head_map.groups
    )


def _random(rng: np.random.Generator, heads: int, groups: int) -> HeadMap:
    while True:
        _, labels = np.unique(rng.integers(groups, size=heads), return_inverse=True)
        if labels.max() == groups - 1:
            return HeadMap(labels.tolist())


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def page(model: str, tables: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: objectives down, numbers of groups across."""
    calibration, _, test = TEXTS[model]
    head = "".join(f" {name} groups: mean | least of any layer |" for name in tables)
    lines = [
        f"# {model}: how well objectives predict the error",
        "",
        f"`python -m benchmarks.studies.objectives {model}`, commit {commit()}. Spearman's "
        f"correlation with the error on {test} test texts, over {PARTITIONS} random partitions of "
        f"one layer's K and V heads. Moments are of {calibration} other texts.",
        "",
        f"| objective |{head}",
        "|---|" + "--:|--:|" * len(tables),
    ]
    for name in next(iter(tables.values()))[0]:
        cells = []
        for layers in tables.values():
            values = [layer[name] for layer in layers]
            cells += [f"{statistics.mean(values):.2f}", f"{min(values):.3f}"]
        if name == "spread":
            name = "the errors' standard deviation over their mean"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--folder", type=Path, help="the unpacked package mgm")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and Markdown")
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.model}_objectives.json"
    tables = json.loads(path.read_text())["tables"] if path.exists() else {}
    bench = Bench(arguments.model, arguments.folder)
    heads = bench.weights[0].num_heads
    wanted = {str(count): (count,) for count in COUNTS[arguments.model]}
    for name, counts in {**wanted, ANY: range(1, heads + 1)}.items():
        if name in tables:
            continue
        tables[name] = bench.table(counts)
        data = {
            "device": device_name(torch.device("cpu")), "commit": commit(), "versions": versions(),
            "model": arguments.model, "texts": TEXTS[arguments.model], "tables": tables,
        }  # fmt: skip
        write_atomically(path, json.dumps(data, indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), page(arguments.model, tables))
    print(page(arguments.model, tables))


if __name__ == "__main__":
    main()
