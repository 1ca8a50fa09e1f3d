"""Fewer KV heads by every published grouping and by ours: one table per model.

    pip install --no-deps microformer-mgm     # or unpack it and name the folder with --folder
    python -m benchmarks.studies.grouping mgm --out benchmarks/results/grouping
    python -m benchmarks.studies.grouping minilm --out benchmarks/results/grouping

``mgm`` is a trained GPT-2 of 8 layers of 8 heads, each with its own K and V. Its texts are drawn
from the model itself. ``minilm`` is an encoder of 6 layers of 12 heads. A seed draws which texts
are for calibration, which are held out for choices, and which are for the numbers reported. Every
row of a column keeps the same number of bytes of K and V. Nothing is trained.

Rows that are done are in the JSON file and are not run again, so the script can be stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.convert.evaluation import predicts_next_token
from gqa_kernels.convert.loss_plan import plan_by_loss
from gqa_kernels.convert.losses import losses_of
from gqa_kernels.convert.sensitivity import layer_weights_by
from gqa_kernels.convert.shift import PredictionShift
from gqa_kernels.grouping import calibrate, layer_errors, search
from gqa_kernels.grouping.key_norms import key_norms
from gqa_kernels.grouping.moments import LayerStats
from gqa_kernels.grouping.similarity import layer_similarity
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers, layer_weights
from gqa_kernels.reporting.device import device_name
from gqa_kernels.reporting.files import write_atomically

from ..report.results import commit, versions

TEXTS = {"mgm": (64, 128, 128), "minilm": (32, 16, 32)}  # to calibrate, to choose by, to report on
COUNTS = {"mgm": (4, 2), "minilm": (6, 3)}
SEEDS = (0, 1, 2)
OURS = "measured loss"
Maps = list[tuple[HeadMap, HeadMap]]


@dataclass(frozen=True)
class Method:
    """A row: a grouping and how heads are merged.

    Attributes:
        name: with its source.
        search: a method of ``search``.
        kind: of similarity.
        sizes: rule for group sizes.
        merging: method of ``convert``.
        options: of the method.
    """

    name: str
    search: str
    kind: str
    sizes: str | tuple[int, int]
    merging: str
    options: tuple[tuple[str, object], ...] = ()


METHODS = (
    Method("neighbour, mean (GQA)", "neighbour", "weight", "equal", "mean"),
    Method("neighbour, weighted (WGQA, untrained)", "neighbour", "weight", "equal", "weighted"),
    Method("AsymGQA symmetric", "asymgqa", "activation", "equal", "mean"),
    Method("AsymGQA asymmetric", "asymgqa_uneven", "activation", "free", "mean"),
    Method("KDGQA sizes (key_norm)", "key_norm", "activation", "free", "mean"),
    Method("QCQA stage 1 (NSGA-II)", "nsga2", "weight_sharing_error", "free", "mean"),
    Method("Align", "align", "aligned_cosine", "equal", "aligned"),
    Method("neighbour, aligned", "neighbour", "weight", "equal", "aligned"),
    Method("neighbour, low rank", "neighbour", "weight", "equal", "low_rank"),
    Method("exact even, functional, low rank", "exact", "functional", "equal", "low_rank"),
    Method("exact uneven, functional, low rank", "exact", "functional", "free", "low_rank"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method at one number of KV heads, for one seed.

    Attributes:
        error: mean over the layers of the held-out error of the attention output.
        shift: KL(parent || child) in nats a token; of encoders the squared change of the last
            states over their variance.
    """

    method: str
    kv_heads: int
    seed: int
    error: float
    shift: float


class Bench:
    """A model, and what a seed's texts say about it."""

    def __init__(self, name: str, folder: Path | None, seed: int):
        register("asym_gqa", backend="reference")
        self.model, texts = MODELS[name](folder)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        parts = texts[order][: sum(TEXTS[name])].split(TEXTS[name])
        calibration, self.held_out, self.test = (batches_of(part) for part in parts)
        self.seed = seed
        self.stats: list[LayerStats] = calibrate(self.model, calibration)
        self.weights = [layer_weights(layer) for layer in attention_layers(self.model)]
        self.losses = losses_of(self.model, self.stats, self.held_out, queries=8192)
        self.shift = PredictionShift(self.model, self.test)

    def published(self, method: Method, groups: int) -> Maps:
        """Of all layers, K and V apart."""
        found = []
        for index, weights in enumerate(self.weights):
            stats, options = self.stats[index], dict(method.options)
            if method.search == "key_norm":
                options["norms"] = key_norms(weights, groups, stats).numpy()
            sides = []
            for side in "kv":
                D = layer_similarity(weights, stats, side, method.kind)
                sides.append(
                    search(D, groups, method.search, method.sizes, self.seed + index, **options)
                )
            found.append(tuple(side.head_map for side in sides))
        return found

    def row(self, name: str, maps: Maps, merging: str, groups: int) -> Row:
        child = convert(self.model, maps, merging, moments=self.stats)
        child.set_attn_implementation("asym_gqa")
        errors = layer_errors(self.model, child, self.test)
        return Row(name, groups, self.seed, sum(errors) / len(errors), self.shift(child))

    def ours(self, groups: int) -> dict[str, Maps]:
        """Equal counts, then the same total spent by layer with each estimator of weights."""
        layers = len(self.losses)
        none = [1.0] * layers
        plans = {f"{OURS}, equal counts": plan_by_loss(self.losses, none, num_kv_heads=groups)}
        estimators = ("none", "fisher", "kl") if predicts_next_token(self.model) else ("none", "kl")
        for name in estimators:
            weights = self.worth(name)
            found = plan_by_loss(self.losses, weights, budget=2 * groups * layers)
            plans[f"{OURS}, budget, weights {name}"] = found
        return {name: found.maps for name, found in plans.items()}

    def worth(self, estimator: str) -> list[float]:
        return layer_weights_by(estimator, self.model, self.held_out, self.losses, self.stats)


def batches_of(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "attention_mask": (part != 0).long()} for part in ids.split(32)]


def mgm(folder: Path | None, count: int = 384) -> tuple[nn.Module, Tensor]:
    """The model and texts of up to 96 tokens that it wrote, padded with 0."""
    from transformers import GPT2LMHeadModel

    if folder is None:
        package = find_spec("mgm")
        if package is None:
            raise ModuleNotFoundError("pip install --no-deps microformer-mgm, or --folder")
        folder = Path(package.submodule_search_locations[0])
    folder = folder / "resources" / "general_model"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    parts = []
    for _ in range(count // 64):
        ids = model.generate(
            torch.full((64, 1), model.config.bos_token_id),
            attention_mask=torch.ones(64, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=95,
            pad_token_id=0,
        )
        parts.append(nn.functional.pad(ids, (0, 96 - ids.shape[1])))
    return model, torch.cat(parts)


def minilm(folder: Path | None, count: int = 384) -> tuple[nn.Module, Tensor]:
    """The model and texts of 128 tokens: 224 of some chapters of the Python reference, then 160 of
    others."""
    from .real_models import minilm as load
    from .real_models import texts

    loaded = load()
    parts = texts(loaded, 224, 0, 160)
    return loaded.model, torch.cat([batch for part in parts for batch in part])[:count]


MODELS = {"mgm": mgm, "minilm": minilm}


def table(rows: Sequence[Row]) -> str:
    """Markdown: methods down, counts across."""
    counts = list(dict.fromkeys(row.kv_heads for row in rows))
    head = "".join(f" {c} heads: error | {c} heads: shift |" for c in counts)
    lines = [f"| method |{head}", "|---|" + "--:|--:|" * len(counts)]
    for name in dict.fromkeys(row.method for row in rows):
        cells = [
            _cell([getattr(r, field) for r in rows if (r.method, r.kv_heads) == (name, count)])
            for count in counts
            for field in ("error", "shift")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    """Mean and spread over seeds; only the value if there is one seed."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--folder", type=Path, help="the unpacked package mgm")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and Markdown")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.model}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = [Row(**row) for row in kept["rows"]]
    about = {
        "device": device_name(torch.device("cpu")), "commit": commit(), "versions": versions(),
        "model": arguments.model, "texts": TEXTS[arguments.model],
    }  # fmt: skip

    def keep() -> None:
        data = {**about, "rows": [asdict(row) for row in rows]}
        write_atomically(path, json.dumps(data, indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), _page(arguments.model, rows))

    counts = COUNTS[arguments.model]
    for seed in arguments.seeds:
        done = {(row.method, row.kv_heads) for row in rows if row.seed == seed}
        bench = Bench(arguments.model, arguments.folder, seed)
        for groups in counts:
            jobs = {m.name: (m.merging, partial(bench.published, m, groups)) for m in METHODS}
            for name, maps in bench.ours(groups).items():
                jobs[name] = ("low_rank", lambda maps=maps: maps)
            for name, (merging, maps) in jobs.items():
                if (name, groups) in done:
                    continue
                rows.append(bench.row(name, maps(), merging, groups))
                print(rows[-1], flush=True)
                keep()
    print(table(rows))


def _page(model: str, rows: Sequence[Row]) -> str:
    seeds = len({row.seed for row in rows})
    return (
        f"# {model}: fewer KV heads at equal bytes, nothing trained\n\n"
        f"`python -m benchmarks.studies.grouping {model}`, commit {commit()}. Seeds run: {seeds}; "
        "with several, mean and standard deviation. Error: of the attention output, over its "
        "variance, mean over layers. Shift: KL to the parent in nats a token (encoders: squared "
        "change of the last states over their variance).\n\n" + table(rows)
    )


if __name__ == "__main__":
    main()
