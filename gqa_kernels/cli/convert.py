"""``gqa-kernels convert``: write a model with the KV heads of a plan."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from .arguments import add_device, add_model, add_text, count_or_zero
from .data import batches, draw, load_model
from .outcome import Outcome

SUMMARY = "merge a model's KV heads as a plan says, and train it a little if asked"
EXAMPLE = "gqa-kernels convert smollm2 found child --steps 50"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "convert",
        help=SUMMARY,
        description="Writes a checkpoint folder in the types of the model, with the maps in its "
        "config, and maps.png in it; with --steps also recovery.json and recovery.png.",
    )
    add_model(parser, "model", "what to convert")
    parser.add_argument("plan", type=Path, help="folder that search wrote, or its plan.json")
    parser.add_argument("out", type=Path, help="folder for the checkpoint; must not exist")
    parser.add_argument("--merging", help="instead of the plan's")
    parser.add_argument("--steps", type=count_or_zero, default=0, help="of recovery (%(default)s)")
    parser.add_argument("--train", default="attention", help="all, attention or lora (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what recovery computes in; the trained weights stay fp32 (%(default)s)",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute activations in recovery: less memory, more time",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(%(default)s)")
    parser.add_argument(
        "--distillation",
        type=float,
        default=1.0,
        help="weight of the parent's predictions against the text's own tokens (%(default)s)",
    )
    parser.add_argument(
        "--validate",
        type=count_or_zero,
        default=2,
        metavar="TEXTS",
        help="texts kept from training, to measure the distance to the parent before, every 50 "
        "steps and after (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of texts (%(default)s)")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="keep the state of the recovery there; an interrupted run continues from it "
        "(OUT.recovery, removed at the end)",
    )
    add_device(parser)
    add_text(parser, "text to train on", (16, 512))
    parser.set_defaults(run=run, kept=kept)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..convert import convert, save
    from ..convert.plan import Plan
    from ..convert.recovery import Recipe, recover
    from ..convert.shift import PredictionShift
    from ..grouping.merging import check_merging
    from ..grouping.moments import load_stats
    from ..integrations.transformers import register
    from ..models.fingerprint import check_same, fingerprint
    from ..models.float_types import set_float_types
    from ..reporting import plots
    from ..reporting.files import check_new_folder, write_atomically
    from ..samples.text import calibration_text

    # Check everything that can be checked before any computation starts.
    out = check_new_folder("out", arguments.out)
    path = arguments.plan / "plan.json" if arguments.plan.is_dir() else arguments.plan
    found = Plan.load(path)
    merging = arguments.merging or found.merging
    check_merging(merging)
    recipe = None
    if arguments.steps:
        recipe = Recipe(
            steps=arguments.steps,
            trained=arguments.train,
            learning_rate=arguments.learning_rate,
            distillation=arguments.distillation,
            dtype=arguments.dtype,
            checkpointing=arguments.checkpointing,
            seed=arguments.seed,
        )
    model, tokenizer, types = load_model(arguments.model, arguments.device)
    made_from = fingerprint(model)
    if found.made_from:
        check_same(path, found.made_from, made_from)
    moments = path.parent / "moments.safetensors"
    stats = load_stats(moments, {**found.made_from, **made_from}) if moments.exists() else None
    texts = batches(arguments, tokenizer, calibration_text) if recipe else []
    kept = -(-arguments.validate // arguments.batch_size)
    if recipe and kept >= len(texts):
        raise ValueError(
            f"--validate must leave a batch to train on, got {arguments.validate} texts for "
            f"{len(texts)} batches"
        )
    held_out, texts = texts[len(texts) - kept :], texts[: len(texts) - kept]

    child = convert(
        model,
        found.maps,
        merging,
        moments=stats,
        restore_norms=found.restore_norms,
        share_weights=recipe is None,
    )
    history = None
    if recipe:
        child.set_attn_implementation(register())
        origin = {**made_from, **_origin(found, merging, moments)}
        history = recover(
            child,
            texts,
            recipe,
            parent=model,
            validate=PredictionShift(model, held_out) if held_out else None,
            folder=_state(arguments),
            made_from=origin,
            progress=True,
        )
    set_float_types(child, types)
    if history is not None and history.validation:
        (_, before), *_, (steps, after) = history.validation
        print(f"distance to the parent: {before:.4g} before, {after:.4g} after {steps} steps")
    print(f"wrote {save(child, out, processor=tokenizer)}")
    draw(plots.maps, found.maps, out / "maps.png")
    if history is not None:
        write_atomically(out / "recovery.json", history.to_json())
        draw(plots.training, history.loss, history.validation, out / "recovery.png")
        if arguments.state is None:
            shutil.rmtree(_state(arguments))
    validation = history.validation if history is not None else []
    return Outcome({"checkpoint": str(out), "merging": merging, "validation": validation})


def kept(arguments: argparse.Namespace) -> str | None:
    from ..convert.recovery import steps_kept

    folder = _state(arguments)
    steps = steps_kept(folder) if arguments.steps else 0
    if not steps:
        return None
    return (
        f"{steps} of {arguments.steps} steps of recovery are kept in {folder}: the same command "
        "continues"
    )


def _state(arguments: argparse.Namespace) -> Path:
    """The folder in which the state of the recovery is kept."""
    return arguments.state or arguments.out.with_name(f"{arguments.out.name}.recovery")


def _origin(plan: Any, merging: str, moments: Path) -> dict[str, str]:
    """The inputs, besides the model, that determine the child's initial weights."""
    from ..grouping.moments import made_from
    from ..models.fingerprint import fingerprint

    maps = [[list(head_map) for head_map in pair] for pair in plan.maps]
    found = fingerprint(maps=maps, merging=merging, restore_norms=plan.restore_norms)
    if moments.exists():
        found["calibration data"] = made_from(moments).get("data", "unknown")
    return found
