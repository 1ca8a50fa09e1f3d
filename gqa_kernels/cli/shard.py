"""``gqa-kernels shard``: split a checkpoint across the ranks of tensor parallelism."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import count, count_or_zero


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "shard",
        help="split a checkpoint across the ranks of tensor parallelism",
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


def run(arguments: argparse.Namespace) -> int:
    from ..parallel.shard_checkpoint import shard_checkpoint

    costs = {"query_cost": arguments.query_cost, "kv_cost": arguments.kv_cost}
    print(f"wrote {shard_checkpoint(arguments.model, arguments.out, arguments.ranks, **costs)}")
    return 0
