"""``gqa-kernels search``: calibrate a model and search maps for all of its layers."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arguments import add_device, add_model, add_text, count
from .data import batches, draw, load_model
from .outcome import Outcome

SUMMARY = "find which query heads should share a KV head"
EXAMPLE = "gqa-kernels search smollm2 --budget 67% --out found"
SUMS = "sums.safetensors"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "search",
        help=SUMMARY,
        description="Spends a total of KV heads over K, V and layers so that the model loses "
        "least. Writes moments.safetensors, plan.json and pictures of the maps, of the curves "
        "over the number of heads, and of the first layer's heads.",
    )
    add_model(parser, "model", "what to search")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument(
        "--budget",
        default="50%",
        metavar="TOTAL",
        help="KV cache to keep: 50%% of the model's, 12KiB a token, or 64 heads, K and V of all "
        "layers counted (50%%)",
    )
    heads.add_argument(
        "--kv-heads", type=count, metavar="G", help="instead, K and V heads of every layer"
    )
    parser.add_argument(
        "--kind",
        help="what to minimise: the loss of each layer's output on held-out text, or a similarity "
        "of pairs of heads (loss; functional with another --method than exact)",
    )
    parser.add_argument("--method", default="exact", help="search by similarity (%(default)s)")
    parser.add_argument(
        "--weights",
        choices=("kl", "fisher", "none"),
        default="kl",
        help="how layers are weighed against each other (%(default)s)",
    )
    parser.add_argument(
        "--sizes",
        choices=("free", "equal", "auto"),
        default="auto",
        help="group sizes; auto: by held-out error, layer by layer (%(default)s)",
    )
    parser.add_argument("--shared", action="store_true", help="one map for K and V")
    parser.add_argument("--merging", default="low_rank", help="of the conversion (%(default)s)")
    parser.add_argument("--check", action="store_true", help="search both halves of the data, too")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    add_device(parser)
    add_text(parser, "calibration text", (16, 512))
    parser.set_defaults(run=run, kept=kept)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..convert.plan import check_plan, plan
    from ..grouping import calibrate
    from ..grouping.convergence import split_half
    from ..grouping.moments import save_stats
    from ..grouping.similarity import similarity
    from ..integrations.transformers import register
    from ..models.fingerprint import fingerprint
    from ..reporting import plots
    from ..reporting.files import check_output_folder
    from ..samples.text import calibration_text

    register()
    if arguments.kind is None:
        arguments.kind = "loss" if arguments.method == "exact" else "functional"
    out = check_output_folder("--out", arguments.out)
    model, tokenizer, types = load_model(arguments.model, arguments.device)
    request = {name: getattr(arguments, name) for name in ("kind", "method", "sizes", "merging")}
    request["budget"] = None
    if arguments.kv_heads is None:
        request["budget"] = heads_of(arguments.budget, model, types)
    check_plan(model, arguments.kv_heads, **request)
    data = batches(arguments, tokenizer, calibration_text)
    held_out = None
    if arguments.kind == "loss" or arguments.sizes == "auto":
        if len(data) < 2:
            raise ValueError(f"--shape and --batch-size must make 2 batches, got {len(data)}")
        count = max(1, len(data) // 4)
        data, held_out = data[:-count], data[-count:]
    made_from = fingerprint(model, data)
    stats = calibrate(model, data, halves=arguments.check, resume=out / SUMS, progress=True)
    print(f"wrote {save_stats(stats, out / 'moments.safetensors', made_from)}")
    found = plan(
        model,
        stats,
        arguments.kv_heads,
        **request,
        shared=arguments.shared,
        held_out=held_out,
        weights=arguments.weights,
        progress=True,
    )
    print(f"wrote {replace(found, made_from=made_from).save(out / 'plan.json')}")
    (out / SUMS).unlink()
    for index, layer in enumerate(found.layers):
        print(_line(index, layer))
    print("\n".join(_summary(found, request["budget"])))
    kind = "functional" if found.kind == "loss" else found.kind
    if arguments.check:
        checks = split_half(model, stats, found.layers[0].key.num_groups, kind=kind)
        same = sum(check.same for check in checks)
        worst = max(max(check.excess) for check in checks)
        print(f"split halves: same groups in {same} of {len(checks)} layers, at worst {worst:.1%}")
    draw(plots.maps, found.maps, out / "maps.png")
    draw(plots.curves, found.curves, out / "curves.png")
    side = "shared" if arguments.shared else "k"
    distances = similarity(model, stats, 0, side, kind).array
    draw(plots.dendrogram, distances, found.layers[0].key.labels, out / "heads.png")
    maps = [{"k": list(key), "v": list(value)} for key, value in found.maps]
    return Outcome({"plan": str(out / "plan.json"), "layers": maps, "predicted": found.predicted})


def kept(arguments: argparse.Namespace) -> str | None:
    from ..grouping.moments import batches_kept

    path = arguments.out / SUMS
    if not path.exists():
        return None
    return f"{batches_kept(path)} batches are kept in {path}: the same command continues"


def heads_of(text: str, model: Any, types: Any) -> int:
    """The number of K plus V heads over all layers that a ``--budget`` permits.

    Raises:
        ValueError: the text is not a percentage, bytes per token, or a number of heads.
    """
    from ..models.families import attention_layers

    layers = attention_layers(model)
    kept = re.fullmatch(r"(\d+(?:\.\d+)?)(%|KiB|MiB|B)?", text)
    if kept is None:
        raise ValueError(f"--budget must be as 50%, 12KiB or 64, got {text!r}")
    number, unit = float(kept[1]), kept[2]
    if unit == "%":
        return int(number / 100 * sum(layer.heads.key + layer.heads.value for layer in layers))
    if unit is not None:
        weight = layers[0].key.weight
        name = next(name for name, each in model.named_parameters() if each is weight)
        size = layers[0].head_dim * types[name].itemsize
        return int(number * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit] / size)
    if not number.is_integer():
        raise ValueError(f"--budget must be a whole number of heads, got {text!r}")
    return int(number)


def _summary(found: Any, budget: int | None) -> list[str]:
    """What the search minimised, and what the same number of KV heads costs when distributed
    otherwise."""
    if found.kind != "loss":
        return [f"minimised: {found.kind}, a sum over pairs of heads; not the error of the layer"]
    proved = sum(layer.key.proved and layer.value.proved for layer in found.layers)
    joint = sum(layer.candidate == "joint" for layer in found.layers)
    lines = [
        "minimised: held-out error of each layer's attention output; proved optimal for K and V "
        f"apart in {proved} of {len(found.layers)} layers, improved for both together in {joint}"
    ]
    spent, equal = found.predicted["by layer"], found.predicted.get("equal counts")
    if budget is None:
        lines.append(
            f"predicted loss with equal counts: {equal:.4g} nats a token; the same total spent by "
            f"layer (--budget): {spent:.4g}"
        )
    else:
        lines.append(f"predicted loss: {spent:.4g} nats a token")
        if equal is not None:
            lines.append(f"with equal counts in every layer: {equal:.4g}")
    return lines


def _line(index: int, layer) -> str:
    sides = []
    for name, result in (("K", layer.key), ("V", layer.value)):
        proof = "optimal" if result.proved else f"at least {result.lower_bound:.4g}"
        if not result.proved and not result.lower_bound:
            proof = "not proved"
        sides.append(f"{name} {list(result.labels)} {result.objective:.4g} ({proof})")
    error = "" if layer.error is None else f", {layer.candidate}, held-out error {layer.error:.4g}"
    return f"layer {index}: {'; '.join(sides)}{error}"
