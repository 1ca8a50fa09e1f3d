"""The training loop; a run that was cut off goes on from its checkpoint as if it had not been."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..nn import step_allocations
from .models import Transformer
from .tasks import Task, loss

GRADIENT_NORM = 1.0
WARM_UP = 0.1  # part of the steps


@dataclass
class History:
    """What training left behind.

    Attributes:
        steps, losses, measures: points of the curve, on data that no batch holds.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    measures: list[float] = field(default_factory=list)


def train(
    model: Transformer,
    task: Task,
    seed: int,
    steps: int,
    learning_rate: float,
    first_step: int,
    checkpoint: Path,
    advance: Callable[[int], None],
) -> History:
    """Train ``model`` in place.

    Args:
        first_step: index of the first batch.
        checkpoint: file that is written as training goes, and gone on from where it is there.
        advance: called with the number of steps that are done since the last call.
    """
    settings, history, done = task.settings, History(), 0
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, done = History(**state["history"]), state["done"]
        advance(done)
    while done < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (done + 1) / max(1.0, WARM_UP * steps))
        optimizer.zero_grad()
        loss(model, *task.batch(seed, first_step + done)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        step_allocations(model)
        done += 1
        advance(1)
        if done % settings.evaluate_every == 0 or done == steps:
            value, measure = task.evaluate(model)
            history.steps.append(first_step + done)
            history.losses.append(value)
            history.measures.append(measure)
        if done % settings.save_every == 0 or done == steps:
            _save(checkpoint, model, optimizer, history, done)
    return history


def _save(
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    history: History,
    done: int,
) -> None:
    """Whole or not at all, whenever the run is cut off."""
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "history": vars(history), "done": done}, partial)
    os.replace(partial, path)
