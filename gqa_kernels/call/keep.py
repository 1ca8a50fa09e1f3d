"""KeepCall: which keys of a view stay, and become its first ones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..cache.tensors import is_readable, to_int32
from ..cache.view import KVView
from ..native.arguments import check_tensors
from .over_view import OverView


@dataclass(slots=True, eq=False)
class KeepCall(OverView):
    """Keys to keep in the form that backends take; made by :meth:`create`.

    Attributes:
        kv: the memory, with the lengths before.
        indices: int32 ``[B, Hk, n]`` (strides may be 0): key ``indices[b, h, i]`` becomes key
            ``i``. They ascend, so that a row is read before another is written over it.
        counts: int32 ``[B, Hk]`` (strides may be 0), how many of them count: the lengths after.
        requires_grad: False. No gradient flows through a cache.
    """

    kv: KVView
    indices: Tensor
    counts: Tensor
    requires_grad: bool = False

    @classmethod
    def create(
        cls, view: KVView, kept: Tensor, lengths: Tensor | None = None
    ) -> tuple[KeepCall, Tensor]:
        """The call of :meth:`gqa_kernels.cache.base.KVCache.keep`, whose arguments these are, and
        the lengths after it: int32 ``[B]``, or ``[B, Hk]`` for budgets per head."""
        check_tensors(kept=kept)
        _check_shape("kept", kept, view, last="n")
        if kept.dtype == torch.bool:
            if lengths is not None:
                raise ValueError("lengths must be None where kept is a mask, got a tensor")
            kept, lengths = _indices_of(kept, view)
        elif kept.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"kept.dtype must be bool, int32 or int64, got {kept.dtype}")
        rows = kept.shape[:-1]
        if lengths is None:
            lengths = torch.full(rows, kept.shape[-1], dtype=torch.int32, device=view.device)
        check_tensors(lengths=lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths.dtype must be int32 or int64, got {lengths.dtype}")
        if lengths.shape != rows or lengths.device != view.device:
            raise ValueError(
                f"lengths must have the shape {tuple(rows)} of kept without its last dim, on "
                f"{view.device}, got {tuple(lengths.shape)} on {lengths.device}"
            )
        if kept.dim() == 3 and view.num_k_heads != view.num_v_heads:
            raise NotImplementedError(
                "kept must have shape [B, n], the same for all heads, where key and value heads "
                f"differ in number, got {tuple(kept.shape)} for {view.num_k_heads} key heads and "
                f"{view.num_v_heads} value heads"
            )
        if kept.dim() == 2 and view.lengths_per_head:
            raise ValueError(
                "kept must have shape [B, Hk, n] where each head has its own length, got "
                f"{tuple(kept.shape)}"
            )
        lengths = to_int32(lengths)
        per_head = to_int32(kept if kept.dim() == 3 else kept[:, None])
        counts = lengths if lengths.dim() == 2 else lengths[:, None]
        shape = (view.batch, view.num_k_heads)
        call = cls(view, per_head.expand(*shape, -1), counts.expand(shape))
        call._check_values(per_head, counts)
        return call, lengths

    @classmethod
    def of_arguments(cls, given: Any) -> KeepCall:
        """The call whose op was given the arguments ``given`` (``native.schema.KEEP``)."""
        names = [field.name for field in fields(KVView)]
        view = KVView(**{name: getattr(given, name) for name in names})
        return cls(view, given.indices, given.counts)

    def check(self) -> None:
        """Nothing that :meth:`create` has not checked."""

    def _check_values(self, indices: Tensor, counts: Tensor) -> None:
        """Indices must ascend inside their length, if the host can see them.

        Raises:
            ValueError: naming what is wrong and where.
        """
        before = self.kv.kv_lengths
        assert before is not None  # every cache has them
        if not all(map(is_readable, (indices, counts, before))) or not counts.numel():
            return
        n = indices.shape[2]
        low, high = (int(x) for x in counts.aminmax())
        if low < 0 or high > n:
            raise ValueError(
                f"lengths must lie in [0, {n}], the entries of kept in a row, got "
                f"{low if low < 0 else high}"
            )
        used = torch.arange(n) < counts[..., None]
        outside = used & ((indices < 0) | (indices >= before[..., None]))
        if bool(outside.any()):
            b, h, i = outside.nonzero()[0].tolist()
            at, row = (min(h, x.shape[1] - 1) for x in (indices, before))
            raise ValueError(
                f"kept must lie in [0, {int(before[b, row])}), the length of sequence {b}, head "
                f"{h}, got {int(indices[b, at, i])}"
            )
        falls = used[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        if bool(falls.any()):
            b, h, i = falls.nonzero()[0].tolist()
            raise ValueError(
                "kept must ascend, each key once, got "
                f"{int(indices[b, h, i + 1])} after {int(indices[b, h, i])} at sequence {b}, head "
                f"{h}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are moved; of a quantised cache any that backends know."""
        return torch.float32 if self.kv.format else self.kv.k.dtype

    def describe(self) -> str:
        """The call in words, for errors."""
        return f"keep of {self.indices.shape[2]} keys in {self.kv.describe()}"


def _check_shape(name: str, x: Tensor, view: KVView, last: str) -> None:
    batch, heads = view.batch, view.num_k_heads
    if x.dim() not in (2, 3) or x.shape[:-1] not in ((batch,), (batch, heads)):
        raise ValueError(
            f"{name} must have shape ({batch}, {last}) or ({batch}, {heads}, {last}), got "
            f"{tuple(x.shape)}"
        )
    if x.device != view.device:
        raise ValueError(f"{name}.device must be that of the cache ({view.device}), got {x.device}")


def _indices_of(mask: Tensor, view: KVView) -> tuple[Tensor, Tensor]:
    """Ascending positions of a mask's true entries, and their number.

    The host, if it can see the mask, needs only as many columns as the fullest row has entries.
    """
    counts = mask.sum(-1, dtype=torch.int32)
    n = mask.shape[-1]
    position = torch.arange(n, dtype=torch.int32, device=view.device)
    indices = torch.where(mask, position, n).sort(-1).values
    if is_readable(counts) and counts.numel():
        indices = indices[..., : int(counts.max())]
    return indices, counts
