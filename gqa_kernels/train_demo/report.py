"""The results: a table, a JSON file, loss curves."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..reporting.device import device_name
from ..version import __version__
from .settings import Settings
from .tasks import TASK_CLASSES
from .training import History

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """One method on one task and seed.

    Attributes:
        group_sizes: group sizes of each layer's final map, by KV head.
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

    def show(self, console: Console) -> None:
        """A table per task with mean and spread over the seeds, including methods that do worse."""
        for task in self.settings.tasks:
            table = Table(title=f"{task}: {TASK_CLASSES[task].summary}")
            header, *rows = self._table(task)
            for column in header:
                table.add_column(column)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(f"{len(self.outcomes)} runs, mean ± deviation over the seeds")

    def markdown(self) -> str:
        """The same tables as text."""
        settings = self.settings
        lines = [
            "# train-demo: one small model, then each way of sharing its KV heads",
            "",
            f"From each of {settings.seeds} seeds a model with {settings.num_heads} heads is "
            f"trained for {settings.pretrain_steps} steps, then every method continues from it for "
            f"{settings.steps} more. Mean ± deviation over the seeds.",
        ]
        for task in settings.tasks:
            header, *rows = self._table(task)
            lines += ["", f"**{task}**: {TASK_CLASSES[task].summary}", ""]
            for row in (header, ["---"] * len(header), *rows):
                lines.append(f"| {' | '.join(row)} |")
        made_with = ", ".join(f"{name} {value}" for name, value in _versions().items())
        lines += ["", f"On {device_name(CPU)}, {made_with}"]
        return "\n".join(lines) + "\n"

    def _table(self, task: str) -> list[list[str]]:
        """The column names, and a row for each method."""
        rows = [
            ["method", "KV heads", "test loss", TASK_CLASSES[task].measure, "group sizes, layer 0"]
        ]
        for method in self.settings.methods:
            runs = self._runs(task, method)
            rows.append(
                [
                    method,
                    str(runs[0].num_kv_heads),
                    _spread([run.history.losses[-1] for run in runs]),
                    _spread([run.history.measures[-1] for run in runs]),
                    ",".join(map(str, runs[0].group_sizes[0])),
                ]
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The whole report in the form of its JSON file."""
        return {
            "processor": device_name(CPU),
            "versions": _versions(),
            "threads": torch.get_num_threads(),
            "settings": asdict(self.settings),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def save(self, path: Path) -> None:
        """Write the JSON, and the tables as Markdown beside it."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        path.with_suffix(".md").write_text(self.markdown())

    def plot(self, path: Path) -> None:
        """Test loss by step, one panel per task: the mean over the seeds, and the range."""
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


def _versions() -> dict[str, str]:
    return {"gqa_kernels": __version__, "torch": torch.__version__}


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"
