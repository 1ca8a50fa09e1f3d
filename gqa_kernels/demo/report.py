"""The demo's results as tables and as JSON."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from ..head_map import HeadMap
from ..reporting.device import device_summary
from ..samples import text
from ..samples.smollm2 import LoadedModel
from ..version import __version__
from .baseline import Comparison
from .lossless import Lossless
from .lossy import Merged
from .measure import Speed
from .settings import Settings

SHOWN_LAYERS = 6  # number of maps printed in full; the JSON has all


@dataclass(frozen=True)
class Report:
    """All results of one run; see the classes of its parts.

    Attributes:
        load_seconds, seconds: wall time of loading the model, and of the whole run.
        cpu_seconds: CPU time of the whole run over all threads. It shows whether a slow run was due
            to a busy machine.
    """

    settings: Settings
    loaded: LoadedModel
    load_seconds: float
    lossless: Lossless
    comparison: Comparison
    speed: dict[str, Speed]
    merged: list[Merged]
    seconds: float
    cpu_seconds: float

    @property
    def ok(self) -> bool:
        """Whether the lossless part succeeded."""
        return self.lossless.identical

    def to_dict(self) -> dict:
        config = self.loaded.model.config
        return {
            "ok": self.ok,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "versions": versions(),
            "settings": asdict(self.settings),
            "model": {
                "name": self.loaded.name,
                "layers": config.num_hidden_layers,
                "query_heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "load_seconds": self.load_seconds,
            },
            "lossless": {
                "identical": self.lossless.identical,
                "kv_heads": self.settings.split_kv_heads,
                "maps": [list(head_map) for head_map in self.lossless.maps],
                "stock_tokens": self.lossless.stock_tokens,
                "split_tokens": self.lossless.split_tokens,
                "stock_text": self.lossless.stock_text,
                "split_text": self.lossless.split_text,
            },
            "attention": asdict(self.comparison),
            "speed": {name: asdict(speed) for name, speed in self.speed.items()},
            "lossy": {
                "calibration_text": text.CALIBRATION,
                "evaluation_text": text.EVALUATION,
                "models": [
                    {
                        "method": m.method,
                        "kv_heads": m.kv_heads,
                        "kv_bytes_per_token": m.kv_bytes_per_token,
                        "perplexity": m.perplexity,
                        "key_maps": [list(key_map) for key_map, _ in m.maps],
                        "value_maps": [list(value_map) for _, value_map in m.maps],
                    }
                    for m in self.merged
                ],
            },
        }

    def show(self, console: Console) -> None:
        for table in (self._maps(), self._speeds(), self._perplexities()):
            console.print()
            console.print(table)
        console.print()
        self._verdict(console)

    def _maps(self) -> Table:
        config = self.loaded.model.config
        fewest = self.merged[-1]
        table = Table(title=f"KV head that each of {config.num_attention_heads} query heads reads")
        table.add_column("layer", justify="right")
        table.add_column(f"lossless, {self.settings.split_kv_heads} KV heads")
        table.add_column("group sizes")
        table.add_column(f"{fewest.method}, {fewest.kv_heads:.3g}: K")
        table.add_column("V")
        layers = list(zip(self.lossless.maps, fewest.maps, strict=True))
        for layer, (split, (key_map, value_map)) in enumerate(layers[:SHOWN_LAYERS]):
            table.add_row(
                str(layer), _entries(split), _sizes(split), _entries(key_map), _entries(value_map)
            )
        if len(layers) > SHOWN_LAYERS:
            table.add_row("...", f"({len(layers) - SHOWN_LAYERS} more layers)")
        return table

    def _speeds(self) -> Table:
        settings, device = self.settings, device_summary(self.loaded.model.device)
        table = Table(title=f"Speed, {settings.dtype}, context {settings.context}, {device}")
        table.add_column("model: attention")
        for name in ("KV bytes/token", "prefill tokens/s", "decode tokens/s"):
            table.add_column(name, justify="right")
        for name, speed in self.speed.items():
            table.add_row(
                name, f"{speed.kv_bytes_per_token:,}", f"{speed.prefill:.1f}", f"{speed.decode:.2f}"
            )
        return table

    def _perplexities(self) -> Table:
        texts, length = self.settings.evaluation_shape
        table = Table(title=f"KV heads merged: perplexity of {texts} x {length} tokens")
        table.add_column("groups")
        table.add_column("KV heads", justify="right")
        table.add_column("K group sizes")
        for name in ("KV bytes/token", "perplexity"):
            table.add_column(name, justify="right")
        for m in self.merged:
            table.add_row(
                m.method,
                f"{m.kv_heads:.3g}",
                _common_sizes([key_map for key_map, _ in m.maps]),
                f"{m.kv_bytes_per_token:,}",
                f"{m.perplexity:.2f}",
            )
        return table

    def _verdict(self, console: Console) -> None:
        prompt, part, seen = self.settings.prompt, self.lossless, self.comparison
        console.print(f"[bold]{prompt}[/bold]{part.split_text}", highlight=False)
        count = len(part.stock_tokens)
        if self.ok:
            console.print(
                f"[green]Lossless:[/green] all {count} tokens equal those of the stock model."
            )
        else:
            pairs = zip(part.stock_tokens, part.split_tokens, strict=True)
            first = next(i for i, (a, b) in enumerate(pairs) if a != b)
            console.print(f"[red]NOT lossless:[/red] token {first} of {count} differs; stock text:")
            console.print(part.stock_text, highlight=False)
        for phase, backend in seen.backend.items():
            console.print(
                f"{phase}: backend {backend}, max |asym_gqa - expand + SDPA| = "
                f"{seen.max_error[phase]:.1e} (values up to {seen.max_value[phase]:.1f})"
            )
        console.print(
            f"{self.seconds:.0f} s in all ({self.cpu_seconds:.0f} s of CPU time), "
            f"{self.load_seconds:.0f} s to load the model"
        )


def versions() -> dict[str, str]:
    """Versions of the software that ran, for the report."""
    import transformers

    return {
        "gqa_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _entries(head_map: HeadMap) -> str:
    return ("" if head_map.num_kv_heads <= 10 else " ").join(map(str, head_map))


def _sizes(head_map: HeadMap) -> str:
    return ",".join(map(str, head_map.group_sizes))


def _common_sizes(maps: list[HeadMap]) -> str:
    """Sorted group sizes and the number of layers that have them, the most frequent first."""
    counts = Counter(",".join(map(str, sorted(m.group_sizes, reverse=True))) for m in maps)
    return "  ".join(
        sizes if count == len(maps) else f"{sizes} (x{count})"
        for sizes, count in counts.most_common(3)
    )
