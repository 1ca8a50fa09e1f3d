"""Run a function in processes joined by gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run_ranks(
    function: Callable[..., None], folder: Path, *arguments: object, world: int = WORLD
) -> None:
    """Call ``function(rank, *arguments)`` on every rank; an error of any of them is raised."""
    rendezvous = f"file://{folder}/rendezvous"
    mp.spawn(_rank, args=(rendezvous, world, function, arguments), nprocs=world)


def _rank(
    rank: int, rendezvous: str, world: int, function: Callable[..., None], arguments: tuple
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
