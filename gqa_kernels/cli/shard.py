"""``gqa-kernels shard``: split a checkpoint across the ranks of tensor parallelism."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import count, count_or_zero
from .outcome import Outcome

SUMMARY = "split a checkpoint across the ranks of tensor parallelism"
EXAMPLE = "gqa-kernels shard child shards --ranks 3"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "shard",
        help=SUMMARY,
        description="Writes a folder per rank: its weights, config and maps. Load them with "
        "gqa_kernels.parallel.shard_checkpoint.load_shard.",
    )
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--ranks", type=count, required=True, help="number of ranks")
    for name, what in (("query", "a query head"), ("kv", "a KV head; long contexts weigh it more")):
        parser.add_argument(
            f"--{name}-cost", type=count_or_zero, default=1, help=f"load of {what} (%(default)s)"
        )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..parallel.shard_checkpoint import shard_checkpoint

    costs = {"query_cost": arguments.query_cost, "kv_cost": arguments.kv_cost}
    out = shard_checkpoint(arguments.model, arguments.out, arguments.ranks, **costs)
    print(f"wrote {out}")
    return Outcome({"folder": str(out), "ranks": arguments.ranks})
