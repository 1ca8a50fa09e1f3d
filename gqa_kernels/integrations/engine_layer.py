"""The options by which a serving engine's attention layers differ, for all engines."""

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
        value_head_map: the map of V, if it differs.
        window: how many keys before itself a token sees, itself not counted; None for all.
        softcap: None for no softcap.
        causal: whether a token can't see later ones.
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
        """A key that is equal for layers that a kernel can treat alike. Tensors compare by
        identity."""
        return (
            self.head_map, self.value_head_map, self.scale, self.window, self.softcap, self.causal,
            id(self.alibi_slopes), id(self.sinks),
        )  # fmt: skip

    @property
    def kv_heads(self) -> tuple[int, int]:
        """The number of K heads and of V heads."""
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
