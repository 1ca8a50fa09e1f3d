"""The training loop. A run that was interrupted continues from its checkpoint, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..models.fingerprint import Fingerprint, check_same, fingerprint
from ..nn import step_allocations
from ..reporting.files import read_state, write_atomically
from ..reporting.interval import Interval
from .models import Transformer
from .tasks import Task, loss

GRADIENT_NORM = 1.0
WARM_UP = 0.1  # fraction of the steps


@dataclass
class History:
    """The results of training.

    Attributes:
        steps, losses, measures: points of the curve, on data that is in no batch.
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
        checkpoint: file for the state. It is written after the first step, then once a minute, and
            after the last step. If it exists, training continues from it.
        advance: called with the number of steps done since the last call.

    Raises:
        ValueError: the checkpoint was made from another model, other data or other options.
    """
    settings, history, done = task.settings, History(), 0
    made_from = _origin(model, task, seed, steps, learning_rate, first_step)
    interval = Interval()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    if checkpoint.exists():
        state = read_state(checkpoint)
        check_same(checkpoint, state.get("made from"), made_from)
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
        if interval.is_due() or done == steps:
            _save(checkpoint, model, optimizer, history, done, made_from)
            interval.restart()
    return history


def _origin(
    model: Transformer, task: Task, seed: int, steps: int, learning_rate: float, first_step: int
) -> Fingerprint:
    options = asdict(task.settings)
    for name in ("seeds", "tasks", "methods"):  # how many runs there are, not what one of them does
        del options[name]
    options |= {"seed": seed, "steps": steps, "learning_rate": learning_rate}
    return fingerprint(model, [task.data()], **options, first_step=first_step)


def _save(
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    history: History,
    done: int,
    made_from: Fingerprint,
) -> None:
    """Write the state, completely or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    data = io.BytesIO()
    content = {**state, "history": vars(history), "done": done, "made from": made_from}
    torch.save(content, data)
    write_atomically(path, data.getvalue())
