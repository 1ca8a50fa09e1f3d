"""What train-demo runs: its options and sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

METHODS = ("mha", "even", "kdgqa", "dgqa-ema", "searched")
TASKS = ("text", "digits")


@dataclass(frozen=True)
class Settings:
    """Options of one run.

    Attributes:
        tasks: names in ``TASKS``.
        methods: names in ``METHODS``.
        seeds: number of seeds; each has its own initial model and batches.
        num_heads, num_kv_heads: query heads, and KV heads of all methods but ``mha``.
        head_dim, num_layers: sizes of the models, which are ``num_heads * head_dim`` wide.
        batch, length: sequences in a batch; characters of one (text only).
        pretrain_steps, steps: training steps of the first model, which has one KV head per query
            head, and of each method after it.
        window: steps between two DGQA allocations.
        learning_rate: learning rate of AdamW; a tenth of it for ``steps``.
        evaluate_every: steps between two points of the curve.
        backend: of ``asym_gqa_attention``.
    """

    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = METHODS
    seeds: int = 3
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 16
    num_layers: int = 3
    batch: int = 16
    length: int = 128
    pretrain_steps: int = 600
    steps: int = 300
    window: int = 50
    learning_rate: float = 2e-3
    evaluate_every: int = 25
    backend: str = "auto"

    def quick(self) -> Settings:
        """The same settings, in well under a minute; the models learn little."""
        return replace(
            self, seeds=min(self.seeds, 2), head_dim=8, num_layers=2, batch=8, length=48,
            pretrain_steps=30, steps=15, window=5, evaluate_every=5,
        )  # fmt: skip
