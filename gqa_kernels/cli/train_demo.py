"""``gqa-kernels train-demo``: small models trained with uneven groups."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .arguments import count
from .outcome import Outcome

SUMMARY = "small models trained with uneven groups, compared over seeds"
EXAMPLE = "gqa-kernels train-demo --quick --task text --seeds 1"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train-demo",
        help=SUMMARY,
        description="Train a decoder on text and a ViT on digits, then continue from each with "
        "even, key-norm driven and searched groups of the same KV size. An interrupted run "
        "continues from its checkpoints. Downloads nothing.",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("train-demo"), metavar="PATH",
        help="checkpoints, report.json, report.md and losses.svg go there (train-demo)",
    )  # fmt: skip
    parser.add_argument("--task", action="append", choices=("text", "digits"), help="only this one")
    parser.add_argument("--seeds", type=count, metavar="N", help="(3)")
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps")
    parser.set_defaults(run=run, kept=kept)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..samples.smollm2 import require
    from ..train_demo.settings import Settings

    settings = Settings().quick() if arguments.quick else Settings()
    if arguments.task:
        settings = replace(settings, tasks=tuple(dict.fromkeys(arguments.task)))
    if arguments.seeds:
        settings = replace(settings, seeds=arguments.seeds)
    require(
        "rich", "matplotlib", "scipy", *(["scikit-learn"] if "digits" in settings.tasks else [])
    )
    from rich.console import Console

    from ..train_demo.run import run

    console = Console()
    report = run(settings, arguments.folder, console)
    report.show(console)
    report.save(arguments.folder / "report.json")
    report.plot(arguments.folder / "losses.svg")
    return Outcome(report.to_dict())


def kept(arguments: argparse.Namespace) -> str | None:
    found = len(list(arguments.folder.glob("*.pt")))
    if not found:
        return None
    return f"{found} checkpoints are kept in {arguments.folder}: the same command continues"
