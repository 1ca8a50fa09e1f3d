"""``gqa-kernels inspect``: the head maps of a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .arguments import add_model
from .data import draw, load_model
from .outcome import Outcome

SUMMARY = "show the head maps of a checkpoint"
EXAMPLE = "gqa-kernels inspect child"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        help=SUMMARY,
        description="Prints a line per layer; with --out writes maps.json and maps.png.",
    )
    add_model(parser, "model", "what to show")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..models.families import attention_layers
    from ..reporting import plots
    from ..reporting.files import check_output_folder, write_atomically

    if arguments.out is not None:
        check_output_folder("--out", arguments.out)
    model, _, types = load_model(arguments.model)
    layers = attention_layers(model)
    itemsize = types[next(iter(dict(model.named_parameters())))].itemsize
    size = full = 0
    for layer in layers:
        per_head = layer.head_dim * itemsize
        size += (layer.heads.key + layer.heads.value) * per_head
        full += 2 * layer.num_heads * per_head
        print(
            f"layer {layer.index}: {layer.num_heads} query heads; "
            f"K {layer.heads.key} heads {list(layer.key_map)}, "
            f"V {layer.heads.value} heads {list(layer.value_map)}"
        )
    print(f"KV cache: {size} bytes per token, {size / full:.1%} of a head per query head")
    content = [{"k": layer.key_map.entries, "v": layer.value_map.entries} for layer in layers]
    if arguments.out is not None:
        print(f"wrote {write_atomically(arguments.out / 'maps.json', json.dumps(content))}")
        pairs = [(layer.key_map, layer.value_map) for layer in layers]
        draw(plots.maps, pairs, arguments.out / "maps.png")
    return Outcome({"layers": content, "kv_bytes_per_token": size, "share": size / full})
