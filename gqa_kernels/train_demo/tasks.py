"""Two tasks on data that installed packages contain: characters of a text, handwritten digits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..samples.text import calibration_text, evaluation_text
from .models import Transformer
from .settings import Settings

EVALUATION_BATCHES = 4
TEST_IMAGES = 360
IMAGE, PATCH = 8, 2  # pixels on a side


class Task(ABC):
    """A task: its data, model and measure.

    Attributes:
        name: a name in ``settings.TASKS``.
        summary: one line for the report.
        measure: what :meth:`evaluate` returns besides the loss.
    """

    name: str
    summary: str
    measure: str

    def __init__(self, settings: Settings):
        self.settings = settings

    @abstractmethod
    def model(self, num_kv_heads: int, allocation: str | None = None) -> Transformer:
        """A model with new weights, drawn from torch's default generator."""

    @abstractmethod
    def data(self) -> dict[str, Tensor]:
        """All data from which batches and evaluation are drawn."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step. They depend on the arguments only."""

    @abstractmethod
    def evaluate(self, model: Transformer) -> tuple[float, float]:
        """Loss and measure on data that is in no batch."""


class TextTask(Task):
    name = "text"
    summary = "decoder, next characters of the Python language reference (pydoc_data)"
    measure = "bits per character"

    def __init__(self, settings: Settings):
        super().__init__(settings)
        train, test = calibration_text(), evaluation_text()
        self.characters = sorted({*train, *test})
        index = {character: i for i, character in enumerate(self.characters)}
        self.train, self.test = (torch.tensor([index[c] for c in t]) for t in (train, test))

    def model(self, num_kv_heads: int, allocation: str | None = None) -> Transformer:
        width = self.settings.num_heads * self.settings.head_dim
        embedding = nn.Embedding(len(self.characters), width)
        return Transformer(
            embedding, len(self.characters), True, self.settings, num_kv_heads, allocation
        )

    def data(self) -> dict[str, Tensor]:
        return {"train": self.train, "test": self.test}

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        last = len(self.train) - self.settings.length - 1
        starts = torch.randint(last, (self.settings.batch,), generator=_generator(seed, step))
        return self._rows(self.train, starts)

    def evaluate(self, model: Transformer) -> tuple[float, float]:
        last = len(self.test) - self.settings.length - 1
        count = EVALUATION_BATCHES * self.settings.batch
        inputs, targets = self._rows(self.test, torch.arange(count) * last // count)
        loss = _loss_in_batches(model, inputs, targets, self.settings.batch)[0]
        return loss, loss / torch.log(torch.tensor(2.0)).item()

    def _rows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = text[starts[:, None] + torch.arange(self.settings.length + 1)]
        return rows[:, :-1], rows[:, 1:]


class Patches(nn.Module):
    """``[B, 8, 8]`` pixels to ``[B, 16, width]``: 2 x 2 patches with learned positions."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Linear(PATCH * PATCH, width)
        self.positions = nn.Parameter(0.02 * torch.randn((IMAGE // PATCH) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.project(patches) + self.positions


class DigitsTask(Task):
    name = "digits"
    summary = "ViT, handwritten digits (UCI, shipped by scikit-learn)"
    measure = "test accuracy"

    def __init__(self, settings: Settings):
        super().__init__(settings)
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16
        targets = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images, self.targets = images[order], targets[order]

    def model(self, num_kv_heads: int, allocation: str | None = None) -> Transformer:
        width = self.settings.num_heads * self.settings.head_dim
        return Transformer(Patches(width), 10, False, self.settings, num_kv_heads, allocation)

    def data(self) -> dict[str, Tensor]:
        return {"images": self.images, "targets": self.targets}

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        count = len(self.images) - TEST_IMAGES
        size = (4 * self.settings.batch,)
        index = TEST_IMAGES + torch.randint(count, size, generator=_generator(seed, step))
        return self.images[index], self.targets[index]

    def evaluate(self, model: Transformer) -> tuple[float, float]:
        images, targets = self.images[:TEST_IMAGES], self.targets[:TEST_IMAGES]
        return _loss_in_batches(model, images, targets, TEST_IMAGES)


TASK_CLASSES: dict[str, type[Task]] = {task.name: task for task in (TextTask, DigitsTask)}


def loss(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats."""
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@torch.no_grad()
def _loss_in_batches(
    model: Transformer, inputs: Tensor, targets: Tensor, batch: int
) -> tuple[float, float]:
    """Mean cross entropy, and the fraction of targets that are the most probable class."""
    model.eval()
    logits = torch.cat([model(part) for part in inputs.split(batch)]).flatten(0, -2)
    model.train()
    right = (logits.argmax(-1) == targets.flatten()).float().mean()
    return cross_entropy(logits, targets.flatten()).item(), right.item()


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + step)
