"""KVView: where the keys and values of a batch lie, in the one form that every kernel reads.

Storage is ``k [P, Hk, page_size, D]`` and ``v [P, Hv, page_size, Dv]`` with any strides (0 too) and
a contiguous last dim. Key ``j`` of sequence ``b`` and key head ``h`` lies in slot
``s = kv_begin[b] + j``, that is in::

    k[page_table[b, h, s // page_size], h, s % page_size]

and its value in the same place of ``v``. So one form holds

- a dense cache ``[B, H, capacity, D]``: storage of one page per sequence, no page table;
- a dense cache with a batch index: the index is a page table of one page per sequence;
- a paged cache in any memory order; K and V may be views of one packed tensor;
- head-wise pages: page-table rows that differ between heads;
- left padding: ``kv_begin``;
- packed sequences (varlen): one row of storage that every sequence sees, and ``kv_begin`` their
  offsets in it.

A view owns nothing and copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import build
from ..native.arguments import check_tensors
from .formats import FORMATS, NAME_OF_STORAGE, STORED_AS, Format
from .tensors import DTYPES, check_last_stride, is_readable, to_int32

# Bits of KVView.kind.
KIND_BITS = 8
KV_LENGTHS, _PAGE_TABLE, _KV_BEGIN, _K_SCALE, _V_SCALE, _K_ZERO, _V_ZERO, _OTHER_V_TYPE = (
    1 << bit for bit in range(KIND_BITS)
)


@dataclass(eq=False)
class KVView:
    """Keys and values of ``B`` sequences; made by :meth:`create`.

    Attributes:
        k: ``[P, Hk, page_size, D]`` (int4: ``D / 2`` bytes).
        v: ``[P, Hv, page_size, Dv]`` (int4: ``Dv / 2`` bytes).
        kv_lengths: int32 ``[B, Hk]`` (strides may be 0), valid keys, or None: every slot of dense
            memory. Kernels clamp it to ``[0, capacity - kv_begin]``.
        page_table: int32 ``[B, Hk, max_pages]`` (strides may be 0), or None: storage ``b`` is
            sequence ``b``'s. Entries beyond the length are never used.
        kv_begin: int32 ``[B]``, slot of a sequence's first key, or None: 0.
        k_scale, v_scale: fp32 ``[P, H, page_size]`` (strides may be 0) of a quantised cache.
        k_zero, v_zero: the same, or None: the format's default.
    """

    k: Tensor
    v: Tensor
    kv_lengths: Tensor | None = None
    page_table: Tensor | None = None
    kv_begin: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_zero: Tensor | None = None
    v_zero: Tensor | None = None

    @staticmethod
    def dense(k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> KVView:
        """Dense tensors ``[B, H, S, D]``. Every call makes a view, and ``__init__`` takes several
        times as long, so this sets only the fields that differ from their default."""
        view = object.__new__(KVView)
        view.k, view.v = k, v
        if kv_lengths is not None:
            view.kv_lengths = kv_lengths
        return view

    @classmethod
    def packed(cls, k: Tensor, v: Tensor, offsets: Tensor) -> KVView:
        """Packed sequences ``[1, H, total, D]``: sequence ``b`` has the tokens ``offsets[b]`` up to
        ``offsets[b + 1]`` (int32) of a storage that all see."""
        lengths = offsets.diff()[:, None].expand(-1, k.shape[1])
        return cls(k, v, lengths, kv_begin=offsets[:-1])

    @classmethod
    def create(
        cls,
        k: Tensor,
        v: Tensor,
        kv_lengths: Tensor,
        *,
        page_table: Tensor | None = None,
        kv_begin: Tensor | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        k_zero: Tensor | float | None = None,
        v_zero: Tensor | float | None = None,
        check_values: bool = True,
    ) -> KVView:
        """Check and normalise.

        Args:
            k, v: storage as above.
            kv_lengths: ``[B]`` or ``[B, Hk]`` integers.
            page_table: ``[B, max_pages]`` or ``[B, Hk, max_pages]`` integers.
            kv_begin: ``[B]`` integers.
            k_scale, v_scale, k_zero, v_zero: a number or tensor of one element for the whole
                tensor, ``[H]`` per head, ``[P, H]`` per page (of dense storage: sequence) and head,
                or fp32 ``[P, H, page_size]`` per token and head; only the last is written by an
                append.
            check_values: look at lengths, begins and page ids too.

        Raises:
            ValueError, TypeError: the message names the argument, the rule and the value. Values
                of tensors on an accelerator are not looked at.
            NotImplementedError: K and V have formats that do not go together.
        """
        _check_storage(k, v)
        heads = k.shape[1]
        lengths = _as_int32("lengths", kv_lengths, k)
        if lengths.dim() not in (1, 2) or (lengths.dim() == 2 and lengths.shape[1] != heads):
            raise ValueError(
                f"lengths must have shape (B,) or (B, {heads}), got {tuple(lengths.shape)}"
            )
        batch = lengths.shape[0]
        if lengths.dim() == 1:
            lengths = lengths[:, None]
        if page_table is not None:
            page_table = _as_int32("page_table", page_table, k)
            if page_table.dim() == 2:
                page_table = page_table[:, None]
            shape = tuple(page_table.shape)
            if (
                page_table.dim() != 3
                or (shape[0], shape[2] >= 1) != (batch, True)
                or shape[1] not in (1, heads)
            ):
                raise ValueError(
                    f"page_table must have shape ({batch}, max_pages) or ({batch}, {heads}, "
                    f"max_pages) with max_pages at least 1, got {shape}"
                )
            page_table = page_table.expand(batch, heads, shape[2])
        elif k.shape[0] != batch:
            raise ValueError(
                f"k.shape[0] must equal the batch of lengths ({batch}) where no page_table or "
                f"batch index is given, got {k.shape[0]}"
            )
        if kv_begin is not None:
            kv_begin = _as_int32("begin", kv_begin, k)
            if kv_begin.shape != (batch,):
                raise ValueError(f"begin must have shape ({batch},), got {tuple(kv_begin.shape)}")
        quantised = k.dtype in FORMATS
        if quantised and (k_scale is None or v_scale is None):
            raise ValueError(
                f"k_scale and v_scale must be given for storage of type {k.dtype}, got None"
            )
        scales = {
            "k_scale": _rows("k_scale", k_scale, k),
            "v_scale": _rows("v_scale", v_scale, v),
            "k_zero": _rows("k_zero", k_zero, k),
            "v_zero": _rows("v_zero", v_zero, v),
        }
        for side in "kv":
            scale, zero = scales[f"{side}_scale"], scales[f"{side}_zero"]
            if scale is not None and zero is not None and is_dynamic(scale) != is_dynamic(zero):
                raise ValueError(
                    f"{side}_scale and {side}_zero must both be given per token and head, or "
                    "neither"
                )
        view = cls(k, v, lengths.expand(batch, heads), page_table, kv_begin, **scales)
        if check_values:
            view.check_slots(0)
        return view

    def with_memory(self, other: KVView) -> KVView:
        """The same sequences in another layer's memory of the same shape and type."""
        if other is self:
            return self
        for name in ("k", "v"):
            x, planned = getattr(other, name), getattr(self, name)
            if x.shape != planned.shape or x.dtype != planned.dtype or x.device != planned.device:
                raise ValueError(
                    f"{name} of the cache must be as planned, {tuple(planned.shape)} in "
                    f"{planned.dtype} on {planned.device}, got {tuple(x.shape)} in {x.dtype} on "
                    f"{x.device}"
                )
        return KVView(
            other.k, other.v, self.kv_lengths, self.page_table, self.kv_begin, other.k_scale,
            other.v_scale, other.k_zero, other.v_zero,
        )  # fmt: skip

    def check_slots(self, new: int | Tensor) -> None:
        """There must be a slot for every key, and for ``new`` more per sequence (a number, or
        offsets ``[B + 1]``): inside the capacity, in pages that exist. Where the host can see it.

        Raises:
            ValueError: naming what is wrong.
        """
        if self.has_slots(new):
            return
        self._check_lengths()
        self._check_slots(new.diff()[:, None] if isinstance(new, Tensor) else new)

    def has_slots(self, new: int | Tensor) -> bool:
        """Whether the compiled op finds what :meth:`check_slots` asks for. False, too, if it can't
        look."""
        if torch.compiler.is_compiling() or not self.k.is_cpu or build.library_path() is None:
            return False
        offsets, tokens = (new, 0) if isinstance(new, Tensor) else (None, new)
        try:
            return torch.ops.gqa_kernels.cache_slots_exist.default(
                self.kv_lengths, self.page_table, self.kv_begin, offsets, tokens,
                self.k.shape[0], self.k.shape[2],
            )  # fmt: skip
        except RuntimeError:  # a form that it does not take
            return False

    def with_more(self, new: int | Tensor) -> KVView:
        """The same memory with more keys: ``new`` is a number, or ``[B, 1]``. It has lengths."""
        assert self.kv_lengths is not None
        return self.with_lengths(self.kv_lengths + new)

    def with_lengths(self, kv_lengths: Tensor) -> KVView:
        """The same memory with other lengths."""
        return KVView(
            self.k, self.v, kv_lengths, self.page_table, self.kv_begin, self.k_scale, self.v_scale,
            self.k_zero, self.v_zero,
        )  # fmt: skip

    def _check_lengths(self) -> None:
        lengths = self.kv_lengths
        if lengths is not None and lengths.numel() and is_readable(lengths):
            low, high = (int(x) for x in lengths.aminmax())
            if low < 0:
                raise ValueError(f"lengths must be non-negative, got {low}")
            if self.kv_begin is not None and is_readable(self.kv_begin) and self.kv_begin.min() < 0:
                raise ValueError(f"begin must be non-negative, got {int(self.kv_begin.min())}")
            if high > self.capacity:
                raise ValueError(
                    f"lengths must be at most the capacity of a sequence ({self.capacity} = "
                    f"{self.max_pages} pages of {self.page_size}), got {high}"
                )

    def _check_slots(self, new: int | Tensor) -> None:
        lengths = self.kv_lengths
        if lengths is None or not lengths.numel():
            return
        seen = (lengths, self.kv_begin, new if isinstance(new, Tensor) else None)
        if not all(is_readable(x) for x in seen if x is not None):
            return
        end = lengths.long() + new  # a sum of int32 could wrap into the valid range
        if self.kv_begin is not None:
            end = end + self.kv_begin[:, None]
        most = int(end.max())
        if most > self.capacity:
            raise ValueError(
                f"{'' if self.kv_begin is None else 'begin + '}lengths must be at most the "
                f"capacity of a sequence ({self.capacity} = {self.max_pages} pages of "
                f"{self.page_size}), new tokens included, got {most}"
            )
        if self.page_table is None or not most or not is_readable(self.page_table):
            return
        table = self.page_table if self.pages_per_head else self.page_table[:, :1]
        if not self.pages_per_head:
            end = end.amax(1, keepdim=True)
        page = torch.arange(self.max_pages)
        used = page * self.page_size < end[..., None]
        if self.kv_begin is not None:
            used &= page >= self.kv_begin[:, None, None] // self.page_size
        wrong = used & ((table < 0) | (table >= self.num_pages))
        if bool(wrong.any()):
            b, h, p = wrong.nonzero()[0].tolist()
            raise ValueError(
                "entries of page_table (or batch_index) must lie in "
                f"[0, {self.num_pages}), got {int(table[b, h, p])} at sequence {b}, head {h}, "
                f"page {p}"
            )

    @property
    def kind(self) -> int:
        """A number that is the same for views with the same tensors, whatever these hold, of which
        K and V have one type or two."""
        return (
            (KV_LENGTHS if self.kv_lengths is not None else 0)
            | (_PAGE_TABLE if self.page_table is not None else 0)
            | (_KV_BEGIN if self.kv_begin is not None else 0)
            | (_K_SCALE if self.k_scale is not None else 0)
            | (_V_SCALE if self.v_scale is not None else 0)
            | (_K_ZERO if self.k_zero is not None else 0)
            | (_V_ZERO if self.v_zero is not None else 0)
            | (_OTHER_V_TYPE if self.v.dtype != self.k.dtype else 0)
        )

    def describe(self) -> str:
        """The view in words, for errors."""
        return (
            f"{' '.join(self.kinds)} cache with k {tuple(self.k.shape)}, v {tuple(self.v.shape)} "
            f"as [P, H, page_size, D] on {self.device}"
        )

    @property
    def batch(self) -> int:
        return self.k.shape[0] if self.kv_lengths is None else self.kv_lengths.shape[0]

    @property
    def num_k_heads(self) -> int:
        return self.k.shape[1]

    @property
    def num_v_heads(self) -> int:
        return self.v.shape[1]

    @property
    def num_pages(self) -> int:
        """``P``, pages of the storage."""
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def max_pages(self) -> int:
        """Pages of a page-table row; 1 without one."""
        return 1 if self.page_table is None else self.page_table.shape[2]

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return self.max_pages * self.page_size

    @property
    def pages_per_head(self) -> bool:
        """Whether page-table rows may differ between heads."""
        return _differs_between_heads(self.page_table)

    @property
    def lengths_per_head(self) -> bool:
        """Whether a sequence may have another length in each key head."""
        return _differs_between_heads(self.kv_lengths)

    @property
    def format(self) -> Format | None:
        """The storage format of keys, or None if keys and values are stored as they are."""
        return FORMATS.get(self.k.dtype)

    @property
    def value_format(self) -> Format | None:
        """The storage format of values, or None likewise."""
        return FORMATS.get(self.v.dtype)

    @property
    def head_dim(self) -> int:
        return self.k.shape[3] * (self.format.per_byte if self.format else 1)

    @property
    def value_head_dim(self) -> int:
        return self.v.shape[3] * (self.value_format.per_byte if self.value_format else 1)

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a backend must be able to read, named as in ``Capabilities.caches``."""
        kinds = ["dense" if self.page_table is None else "paged"]
        if self.kv_begin is not None:
            kinds.append("kv_begin")
        if self.format is not None:
            kinds.append(NAME_OF_STORAGE[self.k.dtype, self.v.dtype])
        return tuple(kinds)


def _differs_between_heads(x: Tensor | None) -> bool:
    """Whether ``x [B, Hk, ...]`` can hold another value for each head. The stride of a dim of size
    1 means nothing."""
    return x is not None and x.shape[1] > 1 and x.stride(1) != 0


def is_dynamic(rows: Tensor) -> bool:
    """Whether scales (or zeros) ``[P, H, page_size]`` are each row's own, which appends write."""
    return rows.stride(2) != 0


def _check_storage(k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        check_tensors(**{name: x})
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions, got {x.dim()} (shape {tuple(x.shape)})"
            )
        if x.dtype not in DTYPES and x.dtype not in FORMATS:
            raise TypeError(
                f"{name}.dtype must be a floating type or one of {list(FORMATS)}, got {x.dtype}"
            )
        if x.device != k.device:
            raise ValueError(f"{name}.device must equal k.device ({k.device}), got {x.device}")
        if min(x.shape[1:]) < 1:
            raise ValueError(
                f"{name} must have at least one head, slot and column, got shape {tuple(x.shape)}"
            )
        check_last_stride(name, x)
    if v.dtype != k.dtype and (k.dtype, v.dtype) not in NAME_OF_STORAGE:
        pairs = [(k.storage, v.storage) for k, v in STORED_AS.values() if k != v]
        raise NotImplementedError(
            f"v.dtype must equal k.dtype ({k.dtype}), or (k.dtype, v.dtype) be one of {pairs}, got "
            f"{v.dtype}"
        )
    for dim, name in ((0, "pages or sequences"), (2, "slots")):
        if v.shape[dim] != k.shape[dim]:
            raise ValueError(
                f"v must have as many {name} as k ({k.shape[dim]}), got {v.shape[dim]}"
            )


def _as_int32(name: str, x: Tensor, k: Tensor) -> Tensor:
    check_tensors(**{name: x})
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}.dtype must be int32 or int64, got {x.dtype}")
    if x.device != k.device:
        raise ValueError(f"{name}.device must equal k.device ({k.device}), got {x.device}")
    return to_int32(x)


def _rows(name: str, x: Tensor | float | None, storage: Tensor) -> Tensor | None:
    """Scales or zeros as fp32 ``[P, H, page_size]``; stride 0 in the last dim unless per token."""
    if x is None:
        return None
    if storage.dtype not in FORMATS:
        raise ValueError(f"{name} must be None for storage of type {storage.dtype}")
    if not isinstance(x, Tensor):
        x = torch.tensor(float(x), device=storage.device)
    if x.dtype != torch.float32:
        raise TypeError(f"{name}.dtype must be float32, got {x.dtype}")
    if x.device != storage.device:
        raise ValueError(f"{name}.device must equal k.device ({storage.device}), got {x.device}")
    heads, target = storage.shape[1], storage.shape[:3]
    if x.shape == target:
        return x
    # A stride of 0 marks a scale that the caller sets, so that appends don't write it. ``expand``
    # would leave another stride in a dim of size 1.
    if x.numel() == 1:
        return x.as_strided(target, (0, 0, 0))
    if x.shape == (heads,):
        return x.as_strided(target, (0, x.stride(0), 0))
    if x.shape == target[:2]:
        return x.as_strided(target, (*x.stride(), 0))
    raise ValueError(
        f"{name} must have 1 element, shape ({heads},), {tuple(target[:2])} or {tuple(target)}, "
        f"got {tuple(x.shape)}"
    )
