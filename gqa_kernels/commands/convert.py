"""``gqa-kernels convert``: write a model with the KV heads that a plan says."""

from __future__ import annotations

import argparse
from pathlib import Path

from .data import add_model, add_text, batches, draw, load_model, refusing


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="merge a model's KV heads as a plan says, and train it a little if asked",
        description="Writes a checkpoint folder with the maps in its config, and maps.png in it; "
        "with --steps also recovery.json and recovery.png.",
    )
    add_model(parser, "model", "what to convert")
    parser.add_argument("plan", type=Path, help="folder that search wrote, or its plan.json")
    parser.add_argument("out", type=Path, help="folder for the checkpoint; must not exist")
    parser.add_argument("--merging", help="instead of the plan's")
    parser.add_argument("--steps", type=int, default=0, help="of recovery (%(default)s)")
    parser.add_argument("--train", default="attention", help="all, attention or lora (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(%(default)s)")
    parser.add_argument(
        "--distillation", type=float, default=0.0, help="weight of the parent's distributions (0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of texts (%(default)s)")
    parser.add_argument("--state", type=Path, help="folder to keep the recovery's state in")
    add_text(parser, "text to train on", (16, 512))
    parser.set_defaults(run=refusing(run))


def run(arguments: argparse.Namespace) -> int:
    from ..convert import convert, save
    from ..convert.plan import Plan
    from ..convert.recovery import Recipe, recover
    from ..grouping.moments import load_stats
    from ..integrations.transformers import register
    from ..reporting import plots
    from ..reporting.files import write_atomically
    from ..samples.text import calibration_text

    folder = arguments.plan if arguments.plan.is_dir() else arguments.plan.parent
    found = Plan.load(folder / "plan.json" if arguments.plan.is_dir() else arguments.plan)
    moments = folder / "moments.safetensors"
    stats = load_stats(moments) if moments.exists() else None
    model, tokenizer = load_model(arguments.model)
    child = convert(
        model,
        found.maps,
        arguments.merging or found.merging,
        moments=stats,
        restore_norms=found.restore_norms,
    )
    history = None
    if arguments.steps:
        child.set_attn_implementation(register())
        recipe = Recipe(
            steps=arguments.steps,
            trained=arguments.train,
            learning_rate=arguments.learning_rate,
            distillation=arguments.distillation,
            seed=arguments.seed,
        )
        texts = batches(arguments, tokenizer, calibration_text())
        history = recover(child, texts, recipe, parent=model, folder=arguments.state, progress=True)
    print(f"wrote {save(child, arguments.out, processor=tokenizer)}")
    draw(plots.maps, found.maps, arguments.out / "maps.png")
    if history is not None:
        write_atomically(arguments.out / "recovery.json", history.to_json())
        picture = arguments.out / "recovery.png"
        draw(plots.training, history.loss, history.validation, picture)
    return 0
