"""``gqa-kernels search``: calibrate a model and search maps for all of its layers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .arguments import add_model, add_text, count
from .data import batches, draw, load_model

SUMS = "sums.safetensors"


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "search",
        help="find which query heads should share a KV head",
        description="Writes moments.safetensors, plan.json and pictures of the maps, of the curves "
        "over the number of heads, and of the first layer's heads.",
    )
    add_model(parser, "model", "what to search")
    heads = parser.add_mutually_exclusive_group(required=True)
    heads.add_argument("--kv-heads", type=count, metavar="G", help="KV heads of every layer")
    heads.add_argument("--budget", type=count, help="K plus V heads over all layers")
    parser.add_argument("--kind", default="functional", help="similarity (%(default)s)")
    parser.add_argument("--method", default="exact", help="search (%(default)s)")
    parser.add_argument(
        "--sizes",
        choices=("free", "equal", "auto"),
        default="free",
        help="group sizes; auto: by held-out error, layer by layer (%(default)s)",
    )
    parser.add_argument("--shared", action="store_true", help="one map for K and V")
    parser.add_argument("--merging", default="low_rank", help="of the conversion (%(default)s)")
    parser.add_argument("--check", action="store_true", help="search both halves of the data, too")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    add_text(parser, "calibration text", (16, 512))
    parser.set_defaults(run=run, kept=kept)


def run(arguments: argparse.Namespace) -> int:
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
    out = check_output_folder("--out", arguments.out)
    model, tokenizer, _ = load_model(arguments.model)
    request = {
        name: getattr(arguments, name) for name in ("budget", "kind", "method", "sizes", "merging")
    }
    check_plan(model, arguments.kv_heads, **request)
    data = batches(arguments, tokenizer, calibration_text)
    held_out = None
    if arguments.sizes == "auto":
        if len(data) < 4:
            raise ValueError(f"--sizes auto needs at least 4 batches, got {len(data)}")
        data, held_out = data[: -len(data) // 4], data[-len(data) // 4 :]
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
        progress=True,
    )
    print(f"wrote {replace(found, made_from=made_from).save(out / 'plan.json')}")
    (out / SUMS).unlink()
    for index, layer in enumerate(found.layers):
        print(_line(index, layer))
    if arguments.check:
        checks = split_half(model, stats, found.layers[0].key.num_groups, kind=arguments.kind)
        same = sum(check.same for check in checks)
        worst = max(max(check.excess) for check in checks)
        print(f"split halves: same groups in {same} of {len(checks)} layers, at worst {worst:.1%}")
    draw(plots.maps, found.maps, out / "maps.png")
    draw(plots.curves, found.curves, out / "curves.png")
    side = "shared" if arguments.shared else "k"
    distances = similarity(model, stats, 0, side, arguments.kind).array
    draw(plots.dendrogram, distances, found.layers[0].key.labels, out / "heads.png")
    return 0


def kept(arguments: argparse.Namespace) -> str | None:
    from ..grouping.moments import batches_kept

    path = arguments.out / SUMS
    if not path.exists():
        return None
    return f"{batches_kept(path)} batches are kept in {path}: the same command continues"


def _line(index: int, layer) -> str:
    sides = []
    for name, result in (("K", layer.key), ("V", layer.value)):
        proof = "optimal" if result.proved else f"at least {result.lower_bound:.4g}"
        sides.append(f"{name} {list(result.labels)} {result.objective:.4g} ({proof})")
    error = "" if layer.error is None else f", {layer.candidate}, held-out error {layer.error:.4g}"
    return f"layer {index}: {'; '.join(sides)}{error}"
