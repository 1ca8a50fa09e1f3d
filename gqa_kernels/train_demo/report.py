"""What came out: a table, a JSON file, loss curves."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..version import __version__
from .settings import Settings
from .tasks import TASK_CLASSES
from .training import History


@dataclass(frozen=True)
class Outcome:
    """One method on one task and seed.

    Attributes:
        group_sizes: of each layer's map at the end, by KV head.
    """

    task: str
    seed: int
    method: str
    num_kv_heads: int
    group_sizes: list[list[int]]
    history: History


@dataclass(frozen=True)
class Report:
    settings: Settings
    outcomes: list[Outcome]
    seconds: float

    def show(self, console: Console) -> None:
        """A table per task: mean and spread over the seeds, whichever method wins."""
        for task in self.settings.tasks:
            kind = TASK_CLASSES[task]
            table = Table(title=f"{task}: {kind.summary}")
            for column in ("method", "KV heads", "test loss", kind.measure, "group sizes, layer 0"):
                table.add_column(column)
            for method in self.settings.methods:
                runs = self._runs(task, method)
                table.add_row(
                    method,
                    str(runs[0].num_kv_heads),
                    _spread([run.history.losses[-1] for run in runs]),
                    _spread([run.history.measures[-1] for run in runs]),
                    ",".join(map(str, runs[0].group_sizes[0])),
                )
            console.print(table)
        console.print(f"{len(self.outcomes)} runs in {self.seconds:.0f} s, mean ± deviation")

    def save(self, path: Path) -> None:
        """The whole report as JSON."""
        data = {
            "versions": {"gqa_kernels": __version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "settings": asdict(self.settings),
            "seconds": self.seconds,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }
        path.write_text(json.dumps(data, indent=1) + "\n")

    def plot(self, path: Path) -> None:
        """Test loss by step, a panel per task: the mean over the seeds, and from least to most."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(
            1, len(self.settings.tasks), figsize=(6 * len(self.settings.tasks), 4), squeeze=False
        )
        for axis, task in zip(axes[0], self.settings.tasks, strict=True):
            for method in self.settings.methods:
                runs = self._runs(task, method)
                points = list(zip(*(run.history.losses for run in runs), strict=True))
                steps = runs[0].history.steps
                axis.plot(steps, [statistics.mean(p) for p in points], label=method)
                axis.fill_between(
                    steps, [min(p) for p in points], [max(p) for p in points], alpha=0.15
                )
            axis.set(title=TASK_CLASSES[task].summary, xlabel="step", ylabel="test loss (nats)")
            axis.legend()
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)

    def _runs(self, task: str, method: str) -> list[Outcome]:
        return [run for run in self.outcomes if (run.task, run.method) == (task, method)]


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"
