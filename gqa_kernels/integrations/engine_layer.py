"""What sets an attention layer of a serving engine apart, whichever the engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..head_map import HeadMap


@dataclass(frozen=True)
class Layer:
    """One attention layer's options.

    Attributes:
        head_map: the KV head of each query head.
        scale: factor of the scores.
        value_head_map: the same for V if it has a map of its own.
        window: keys a token sees before itself, itself not counted; None for all.
        softcap: None for none.
        causal: whether a token sees no later ones.
        alibi_slopes: fp32 ``[Hq]``, or None.
        sinks: ``[Hq]``, or None.
    """

    head_map: HeadMap
    scale: float
    value_head_map: HeadMap | None = None
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def identity(self) -> tuple:
        """Equal for layers that a kernel can't tell apart: tensors count by their identity."""
        return (
            self.head_map, self.value_head_map, self.scale, self.window, self.softcap, self.causal,
            id(self.alibi_slopes), id(self.sinks),
        )  # fmt: skip

    @property
    def kv_heads(self) -> tuple[int, int]:
        """How many heads K and V have."""
        value_map = self.value_head_map or self.head_map
        return self.head_map.num_kv_heads, value_map.num_kv_heads

    def options(self) -> dict[str, object]:
        """Keyword arguments of :func:`gqa_kernels.asym_gqa_decode`."""
        return {
            "value_head_map": self.value_head_map,
            "causal": self.causal,
            "scale": self.scale,
            "window": None if self.window is None else (self.window, None),
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
