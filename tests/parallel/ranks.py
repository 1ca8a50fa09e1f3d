"""Run a function in two processes joined by gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run_ranks(function: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Call ``function(rank, *arguments)`` on every rank; an error of any of them is raised."""
    mp.spawn(_rank, args=(f"file://{folder}/rendezvous", function, arguments), nprocs=WORLD)


def _rank(rank: int, rendezvous: str, function: Callable[..., None], arguments: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
