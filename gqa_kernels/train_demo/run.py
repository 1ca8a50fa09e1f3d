"""Runs all tasks, seeds and methods in order, each with a progress bar."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .methods import start
from .models import Transformer
from .report import Outcome, Report
from .settings import Settings
from .tasks import TASK_CLASSES, Task
from .training import train

FINE_TUNING = 0.1  # fraction of the learning rate


def run(settings: Settings, folder: Path, console: Console) -> Report:
    """Train everything, with checkpoints in ``folder``. Finished runs are not repeated.

    Raises:
        ValueError: the folder holds checkpoints of other settings, models or data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()]
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        for name in settings.tasks:
            task = TASK_CLASSES[name](settings)
            per_seed = settings.pretrain_steps + len(settings.methods) * settings.steps
            bar = bars.add_task(name, total=settings.seeds * per_seed)
            for seed in range(settings.seeds):
                outcomes += _seed(task, seed, folder, lambda n, bar=bar: bars.advance(bar, n))
    return Report(settings, outcomes)


def _seed(task: Task, seed: int, folder: Path, advance) -> list[Outcome]:
    settings = task.settings
    torch.manual_seed(seed)
    trained = task.model(settings.num_heads)
    train(
        trained, task, seed, settings.pretrain_steps, settings.learning_rate, 0,
        folder / f"{task.name}-{seed}-pretrained.pt", advance,
    )  # fmt: skip
    outcomes = []
    for method in settings.methods:
        model = start(method, task, trained, seed)
        history = train(
            model, task, seed, settings.steps, FINE_TUNING * settings.learning_rate,
            settings.pretrain_steps, folder / f"{task.name}-{seed}-{method}.pt", advance,
        )  # fmt: skip
        num_kv_heads = model.blocks[0].attention.num_kv_heads
        outcomes.append(
            Outcome(task.name, seed, method, num_kv_heads, _group_sizes(model), history)
        )
    return outcomes


def _group_sizes(model: Transformer) -> list[list[int]]:
    attentions = [block.attention for block in model.blocks]
    return [a.head_map.bincount(minlength=a.num_kv_heads).tolist() for a in attentions]
