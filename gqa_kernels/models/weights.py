"""LayerWeights: the projections of one attention layer by head, independent of a model's layout.

``families.layer_weights`` reads them from a model and ``gqa_kernels.convert`` writes them back.
``gqa_kernels.grouping`` works on them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..head_map import HeadMap

ROTARY_LAYOUTS = ("half_split", "interleaved")


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of q and k: the position rotates pairs of dims ("planes").

    Attributes:
        dim: the number of rotated dims, the first of each head (partial rotary: fewer than ``D``).
        layout: ``"half_split"``: plane ``p`` has dims ``(p, p + dim / 2)`` (LLaMA, NeoX);
            ``"interleaved"``: dims ``(2p, 2p + 1)`` (GPT-J).
        frequencies: ``[dim / 2]`` radians per token of each plane (``inv_freq``), or None if
            unknown.
    """

    dim: int
    layout: str = "half_split"
    frequencies: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary.dim must be a positive even number, got {self.dim}")
        if self.layout not in ROTARY_LAYOUTS:
            raise ValueError(f"rotary.layout must be one of {ROTARY_LAYOUTS}, got {self.layout!r}")
        if self.frequencies is not None and len(self.frequencies) != self.dim // 2:
            raise ValueError(
                f"rotary.frequencies must have {self.dim // 2} entries, got {len(self.frequencies)}"
            )

    @property
    def planes(self) -> Tensor:
        """``[dim / 2, 2]`` the two dims of each plane."""
        dims = torch.arange(self.dim)
        return dims.view(2, -1).T if self.layout == "half_split" else dims.view(-1, 2)


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one attention layer by head.

    ``q_h = q[h] x + q_bias[h]``. ``k`` and ``v`` are computed likewise, from the same input or, in
    cross-attention, from another one. Norms and the rotation apply to q and k, and ``out = sum_h
    o[:, h] (attention output of head h) + o_bias``.

    Attributes:
        q: ``[Hq, D, d]``.
        k: ``[Hk, D, d_kv]``; v: ``[Hv, Dv, d_kv]``.
        o: ``[d_out, Hq, Dv]``.
        key_map, value_map: the K and V head that each query head reads.
        q_bias, k_bias, v_bias, o_bias: ``[Hq, D]``, ``[Hk, D]``, ``[Hv, Dv]``, ``[d_out]``, or
            None.
        rotary: None if q and k are not rotated.
        q_norm, k_norm: ``[D]`` weights of the RMS norm of each head of q and k before the rotation
            (Qwen3), or None.
        norm_eps: epsilon of these norms.
        scale: factor of the scores; None is ``D ** -0.5``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    key_map: HeadMap
    value_map: HeadMap
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    rotary: Rotary | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    scale: float | None = None

    def __post_init__(self):
        for name in "qkvo":
            if getattr(self, name).dim() != 3:
                raise ValueError(
                    f"{name} must have 3 dims, got shape {tuple(getattr(self, name).shape)}"
                )
        (Hq, D, _), (Hk, _, d_kv), (Hv, Dv, _) = self.q.shape, self.k.shape, self.v.shape
        for name, shape in {
            "k": (Hk, D, d_kv),
            "v": (Hv, Dv, d_kv),
            "o": (self.o.shape[0], Hq, Dv),
            "q_bias": (Hq, D),
            "k_bias": (Hk, D),
            "v_bias": (Hv, Dv),
            "o_bias": (self.o.shape[0],),
            "q_norm": (D,),
            "k_norm": (D,),
        }.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        for name, count in (("key_map", Hk), ("value_map", Hv)):
            head_map = getattr(self, name)
            if (head_map.num_heads, head_map.num_kv_heads) != (Hq, count):
                raise ValueError(
                    f"{name} must map {Hq} query heads to {count} KV heads, got "
                    f"{head_map.num_heads} to {head_map.num_kv_heads}"
                )
        if self.rotary is not None and self.rotary.dim > D:
            raise ValueError(f"rotary.dim must be at most D = {D}, got {self.rotary.dim}")

    @property
    def num_heads(self) -> int:
        """``Hq``."""
        return self.q.shape[0]

    def rows(self, side: str) -> Tensor:
        """A projection ``"q"``, ``"k"`` or ``"v"``, with its bias (if any) as last column: ``[H, D,
        d (+ 1)]``."""
        weight, bias = getattr(self, side), getattr(self, f"{side}_bias")
        return weight if bias is None else torch.cat([weight, bias[..., None]], -1)

    def with_rows(self, side: str, rows: Tensor, head_map: HeadMap | None = None) -> LayerWeights:
        """A copy of the layer with another projection, in the dtype of the old one.

        Args:
            rows: in the form of ``rows(side)``.
            head_map: new map of K or V, if the number of heads changes.
        """
        weight = getattr(self, side)
        rows = rows.to(weight.dtype)
        changes = {side: rows}
        if getattr(self, f"{side}_bias") is not None:
            changes = {
                side: rows[..., :-1].contiguous(),
                f"{side}_bias": rows[..., -1].contiguous(),
            }
        if head_map is not None:
            changes["key_map" if side == "k" else "value_map"] = head_map
        return replace(self, **changes)

    def to(self, *args, **kwargs) -> LayerWeights:
        """All tensors moved or converted as by ``Tensor.to``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{n: t.to(*args, **kwargs) for n, t in tensors.items() if torch.is_tensor(t)}
        )
