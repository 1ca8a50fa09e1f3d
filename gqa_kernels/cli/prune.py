"""``gqa-kernels prune``: write a model without some of its query heads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import add_model, count
from .data import load_model
from .outcome import Outcome

SUMMARY = "drop query heads, in each layer others"
EXAMPLE = "gqa-kernels prune smollm2 pruned --scores scores.json --count 40"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "prune",
        help=SUMMARY,
        description="Writes a checkpoint folder in the types of the model. A KV head stays as long "
        "as a query head reads it, and every layer keeps at least one head.",
    )
    add_model(parser, "model", "what to prune")
    parser.add_argument("out", type=Path, help="folder for the checkpoint; must not exist")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="JSON list of a list for each layer: the importance of each query head; the least "
        "important go, --count of them",
    )
    which.add_argument(
        "--heads",
        type=Path,
        metavar="FILE",
        help="instead, JSON list of a list for each layer: the query heads to drop, from 0",
    )
    parser.add_argument("--count", type=count, metavar="N", help="heads to drop in all layers")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..convert import lowest_heads, prune_heads, save
    from ..models.families import attention_layers
    from ..models.float_types import set_float_types
    from ..reporting.files import check_new_folder

    out = check_new_folder("out", arguments.out)
    if (arguments.scores is None) != (arguments.count is None):
        raise ValueError("--count must be given with --scores, and only then")
    dropped = _lists(arguments.scores or arguments.heads)
    model, tokenizer, types = load_model(arguments.model)
    layers = attention_layers(model)
    if arguments.scores is not None:
        sizes = [layer.num_heads for layer in layers]
        if [len(each) for each in dropped] != sizes:
            raise ValueError(
                f"--scores must have a number for each query head ({sizes} by layer), got "
                f"{[len(each) for each in dropped]}"
            )
        dropped = lowest_heads(dropped, arguments.count)
    child = prune_heads(model, dropped)
    set_float_types(child, types)
    print(f"wrote {save(child, out, processor=tokenizer)}")
    before, after = (_heads(attention_layers(each)) for each in (model, child))
    for name, old, new in zip(("query heads", "K plus V heads"), before, after, strict=True):
        print(f"{name}: {old} before, {new} after")
    return Outcome({"checkpoint": str(out), "dropped": dropped})


def _heads(layers: Any) -> tuple[int, int]:
    """Query heads, and K plus V heads, of all layers."""
    counts = [layer.heads for layer in layers]
    return sum(each.query for each in counts), sum(each.key + each.value for each in counts)


def _lists(path: Path) -> list[list]:
    """A list of lists of numbers from a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    numbers = isinstance(found, list) and all(
        isinstance(each, list) and all(type(x) in (int, float) for x in each) for each in found
    )
    if not numbers:
        raise ValueError(f"{path} must hold a list of numbers for each layer, got something else")
    return found
