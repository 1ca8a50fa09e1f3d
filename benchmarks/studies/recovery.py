"""Fewer KV heads in SmolLM2-135M: perplexity before and after a short recovery, by method and seed.

    python -m benchmarks.studies.recovery --out benchmarks/results/recovery

SmolLM2's 9 query heads read 3 KV heads. Every query head counts as having its own copy, as in the
MHA model that a lossless split gives; those 9 heads are grouped into 5, 4, 3, 2 and 1. Text to
train on and held-out text are chapters of the Python reference, so the parent gains by training,
too: ``stock`` is the parent, trained alike. What is done is in the JSON file and is not run again:
the script can be stopped at any time. The table and the picture are made from the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gqa_kernels import HeadMap, __version__
from gqa_kernels.convert import convert
from gqa_kernels.convert.evaluation import perplexity
from gqa_kernels.convert.recovery import Recipe, recover
from gqa_kernels.grouping import calibrate, layer_errors, search, similarity
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers
from gqa_kernels.models.fingerprint import Fingerprint, check_same, fingerprint
from gqa_kernels.reporting.files import write_atomically
from gqa_kernels.samples.smollm2 import load_smollm2
from gqa_kernels.samples.text import calibration_text, evaluation_text, rows

HEADS = 9
KV_HEADS = (2, 1, 4, 5, 3)
KIND = "functional"


@dataclass(frozen=True)
class Method:
    """How maps are found and heads merged."""

    search: str
    sizes: str
    merging: str

    def maps(self, model: nn.Module, stats: list, groups: int) -> list[tuple[HeadMap, HeadMap]]:
        """K's and V's map of every layer."""
        low, rest = divmod(HEADS, groups)
        sizes = (low, low + 1) if self.sizes == "even" and rest else self.sizes
        sizes = "equal" if sizes == "even" else sizes
        found = []
        for layer in range(len(attention_layers(model))):
            sides = [similarity(model, stats, layer, side, KIND) for side in "kv"]
            found.append(tuple(search(D, groups, self.search, sizes=sizes).head_map for D in sides))
        return found


METHODS = {
    "neighbour, mean": Method("neighbour", "free", "mean"),
    "uneven, aligned": Method("exact", "free", "aligned"),
    "even, aligned": Method("exact", "even", "aligned"),
    "uneven, low rank": Method("exact", "free", "low_rank"),
    "even, low rank": Method("exact", "even", "low_rank"),
    "neighbour, low rank": Method("neighbour", "free", "low_rank"),
}
STOCK = "stock"
Key = tuple[str, int, int]  # method, KV heads, seed


@dataclass(frozen=True)
class Settings:
    """Sizes of the runs.

    Attributes:
        steps, learning_rate: of recovery: attention weights only, next-token loss, a text a step.
        calibration, training, evaluation: texts and tokens of each. The seed decides which of the
            training texts calibrate, and their order in training.
    """

    steps: int = 12
    learning_rate: float = 3e-4
    calibration: tuple[int, int] = (16, 128)
    training: tuple[int, int] = (96, 128)
    evaluation: tuple[int, int] = (4, 128)


@dataclass
class Row:
    """One run.

    Attributes:
        kv_fraction: KV cache of the child over that of 9 KV heads.
        before: perplexity of the held-out text after conversion.
        layer_error: mean over the layers of the attention-output error on held-out text.
        expanded_difference: largest difference of logits to the same child with K and V expanded
            to all query heads on torch's SDPA, relative to the largest logit.
        after: perplexity after recovery; None until that has run.
        seconds: of the recovery.
    """

    method: str
    kv_heads: int
    seed: int
    kv_fraction: float
    before: float
    layer_error: float
    expanded_difference: float
    after: float | None = None
    seconds: float | None = None


class Runs:
    """All runs of one model, and the file they are in.

    Attributes:
        done: rows by method, KV heads and seed.
    """

    def __init__(self, settings: Settings, path: Path):
        self.settings, self.path = settings, path
        loaded = load_smollm2()
        self.parent = loaded.model
        self.evaluation = rows(loaded.tokenizer, evaluation_text(), settings.evaluation).split(2)
        self.training = rows(loaded.tokenizer, calibration_text(), settings.training)
        data = [*self.evaluation, self.training]
        self.made_from = fingerprint(self.parent, data, **asdict(settings))
        self.done = _read(path, self.made_from)
        self.stats: dict[int, list] = {}

    def before(self, key: Key) -> None:
        """Convert and measure."""
        if key in self.done:
            return
        child = self._child(key)
        error = statistics.fmean(layer_errors(self.parent, child, self.evaluation[:1]))
        row = Row(
            *key,
            kv_fraction=key[1] / HEADS,
            before=perplexity(child, self.evaluation),
            layer_error=error,
            expanded_difference=_expanded_difference(child, self.evaluation[0][:1]),
        )
        self._keep(key, row, f"{row.before:.2f}")

    def after(self, key: Key) -> None:
        """Convert again, train and measure."""
        row = self.done[key]
        if row.after is not None:
            return
        child = self._child(key)
        settings = self.settings
        recipe = Recipe(
            steps=settings.steps, learning_rate=settings.learning_rate, warmup=2, seed=key[2]
        )
        started = time.perf_counter()
        recover(child, self.training.split(1), recipe)
        row.seconds = time.perf_counter() - started
        row.after = perplexity(child, self.evaluation)
        self._keep(key, row, f"{row.before:.2f} -> {row.after:.2f} ({row.seconds:.0f} s)")

    def _child(self, key: Key) -> nn.Module:
        method, groups, seed = key
        if method == STOCK:
            child = copy.deepcopy(self.parent)
        else:
            if seed not in self.stats:
                texts = _sample(self.training, self.settings.calibration[0], seed)
                self.stats[seed] = calibrate(self.parent, texts.split(4))
            maps = METHODS[method].maps(self.parent, self.stats[seed], groups)
            merging = METHODS[method].merging
            child = convert(self.parent, maps, merging, moments=self.stats[seed])
        child.set_attn_implementation("asym_gqa")
        return child

    def _keep(self, key: Key, row: Row, text: str) -> None:
        self.done[key] = row
        _write(self.path, self.settings, self.made_from, self.done.values())
        print(f"{key[0]}, {key[1]} KV heads, seed {key[2]}: perplexity {text}", flush=True)


def run(settings: Settings, seeds: Iterable[int], kv_heads: Sequence[int], path: Path) -> None:
    """Run what the file lacks, perplexities before recovery first; the table and the picture lie
    beside the file."""
    register()
    runs = Runs(settings, path)
    for seed in seeds:
        keys = [(STOCK, 3, seed)]
        keys += [(method, groups, seed) for groups in kv_heads for method in METHODS]
        for step in (runs.before, runs.after):
            for key in keys:
                step(key)
            found = list(runs.done.values())
            picture(found, path.with_suffix(".svg"))
            write_atomically(path.with_suffix(".md"), table(found, settings))


def _sample(texts: Tensor, count: int, seed: int) -> Tensor:
    """Some rows of ``texts``."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return texts[order[:count]]


@torch.no_grad()
def _expanded_difference(child: nn.Module, ids: Tensor) -> float:
    layers = len(attention_layers(child))
    expanded = convert(child, [HeadMap.uniform(HEADS, HEADS)] * layers, merging="none")
    expanded.set_attn_implementation("sdpa")
    ours, theirs = child(ids).logits, expanded(ids).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _read(path: Path, made_from: Fingerprint) -> dict[Key, Row]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    check_same(path, content.get("made_from"), made_from)
    found = [Row(**row) for row in content["rows"]]
    return {(row.method, row.kv_heads, row.seed): row for row in found}


def _write(path: Path, settings: Settings, made_from: Fingerprint, rows_: Iterable[Row]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    content = {
        "model": "SmolLM2-135M-Instruct",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"gqa-kernels": __version__, "torch": torch.__version__, "commit": commit},
        "settings": asdict(settings),
        "made_from": made_from,
        "rows": [asdict(row) for row in rows_],
    }
    write_atomically(path, json.dumps(content, indent=1))


def table(found: Sequence[Row], settings: Settings) -> str:
    """Perplexity before and after recovery, Markdown: means over seeds, their extremes behind."""
    heads = sorted({row.kv_heads for row in found if row.method != STOCK}, reverse=True)
    lines = [
        "# SmolLM2-135M with fewer KV heads: perplexity before and after recovery",
        "",
        f"Recovery: {settings.steps} steps of {settings.training[1]} tokens, attention weights "
        "only. Means over seeds, extremes in brackets where they differ. The parent has 3 KV heads "
        "of its own, so 3 or more lose nothing where the search finds them. `stock` is the parent, "
        "trained alike.",
        "",
        "| method | " + " | ".join(f"{g} KV heads" for g in heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for method in METHODS:
        of_method = [row for row in found if row.method == method]
        cells = (_cell([row for row in of_method if row.kv_heads == g]) for g in heads)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    stock = _cell([row for row in found if row.method == STOCK])
    return "\n".join([*lines, "", f"stock: {stock}", ""])


def _cell(found: Sequence[Row]) -> str:
    """``before -> after`` of the rows that are done."""
    columns = ([row.before for row in found], [row.after for row in found if row.after is not None])
    return " -> ".join(_mean(values) for values in columns)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    texts = sorted({f"{value:.1f}" for value in values}, key=float)
    extremes = f" ({texts[0]}..{texts[-1]})" if len(texts) > 1 else ""
    return f"{statistics.fmean(values):.1f}{extremes}"


def picture(found: list[Row], path: Path) -> None:
    """Perplexity against KV heads, before and after recovery: means over seeds, bars to the
    extremes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, when in zip(axes, ("before", "after"), strict=True):
        for method in METHODS:
            points = {}
            for row in found:
                if row.method == method and getattr(row, when) is not None:
                    points.setdefault(row.kv_heads, []).append(getattr(row, when))
            heads = sorted(points)
            means = [statistics.fmean(points[g]) for g in heads]
            spread = [
                [m - min(points[g]) for g, m in zip(heads, means, strict=True)],
                [max(points[g]) - m for g, m in zip(heads, means, strict=True)],
            ]
            axis.errorbar(heads, means, spread, marker="o", capsize=3, label=method)
        values = [getattr(row, when) for row in found if row.method == STOCK]
        stock = [value for value in values if value is not None]
        if stock:
            axis.axhline(statistics.fmean(stock), color="gray", linestyle="--", label="stock")
        axis.set_yscale("log")
        axis.set_xticks(range(1, max(KV_HEADS) + 1))
        axis.set_xlabel("KV heads (of 9)")
        axis.set_title(f"{when} recovery")
    axes[0].set_ylabel("perplexity")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery"))
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=KV_HEADS)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps)
    run(settings, arguments.seeds, arguments.kv_heads, arguments.out / "smollm2.json")


if __name__ == "__main__":
    main()
