"""What the demo runs: its options and sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

PROMPT = "Once upon a time, in a village by the sea, there lived"


@dataclass(frozen=True)
class Settings:
    """Options of one run.

    Attributes:
        backend: backend of ``asym_gqa_attention``.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for the GPU if there is one.
        prompt: text that generation continues.
        new_tokens: tokens to generate.
        dtype: type of weights and cache for error, speed and perplexity. Generation is compared in
            float32, in which ties practically never happen.
        seed: random seed of the lossless maps.
        split_kv_heads: KV heads of the lossless maps; must not divide the query heads.
        merged_kv_heads: KV heads of the lossy maps.
        recovery_steps: training steps of the model with the fewest KV heads.
        context: tokens of the timed prefill.
        decode_steps: tokens decoded after it, one by one.
        repeats: number of timings; the report shows their median.
        calibration_shape, evaluation_shape: number of texts, and tokens of each.
    """

    backend: str = "auto"
    device: str = "auto"
    prompt: str = PROMPT
    new_tokens: int = 48
    dtype: str = "float32"
    seed: int = 0
    split_kv_heads: int = 5
    merged_kv_heads: tuple[int, ...] = (4, 2)
    recovery_steps: int = 10
    context: int = 1024
    decode_steps: int = 16
    repeats: int = 3
    calibration_shape: tuple[int, int] = field(default=(8, 512))
    evaluation_shape: tuple[int, int] = field(default=(2, 1024))

    def quick(self) -> Settings:
        """The same settings in about a quarter of the time; perplexities are rough."""
        return replace(
            self,
            new_tokens=min(self.new_tokens, 16),
            recovery_steps=2,
            context=256,
            decode_steps=8,
            calibration_shape=(4, 256),
            evaluation_shape=(1, 512),
        )
