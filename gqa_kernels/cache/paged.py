"""PagedKVCache: pages of tokens in any order, found through a page table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..native.arguments import as_device, as_int, check_choice, check_tensors, shown
from .allocator import PageBatch
from .base import KVCache, checked_sizes, empty_scales, empty_storage, formats_of
from .tensors import is_readable, to_int32
from .view import KVView

Order = Literal["HND", "NHD"]
ORDERS = ("HND", "NHD")


class PagedKVCache(KVCache):
    """Keys and values in pages, which may belong to an engine.

    Args:
        k: ``[P, Hk, page_size, D]`` for order ``"HND"``, ``[P, page_size, Hk, D]`` for ``"NHD"``;
            any strides with a contiguous last dim, any page size from 1. The dtype says the format,
            as for :class:`~gqa_kernels.DenseKVCache`. Where each page belongs to one head
            (budgets per head), ``[P, page_size, D]``.
        v: the same with ``Hv`` and ``Dv``; K and V may be views of one packed tensor.
        page_table: ``[B, max_pages]`` integers, or ``[B, Hk, max_pages]`` with pages per head.
            What lies beyond a sequence's length is never used.
        lengths: ``[B]`` integers, or ``[B, Hk]``: keys there are.
        order: memory order of k and v as given.
        begin: ``[B]`` integers, slot of a sequence's first key; default 0.
        k_scale, v_scale, k_zero, v_zero: of a quantised cache: one number, ``[H]`` per head,
            ``[P, H]`` per page and head, or fp32 ``[P, H, page_size]`` per token, which an append
            then computes and writes.
        k_channels, hadamard: how keys are stored, as for :class:`~gqa_kernels.DenseKVCache`.

    Examples:
        >>> import torch
        >>> from gqa_kernels import PagedKVCache
        >>> k, v = torch.zeros(2, 32, 3, 16, 64)  # [P, Hk, page_size, D] each
        >>> table = torch.tensor([[4, 7], [9, 0]])
        >>> cache = PagedKVCache(k, v, table, lengths=torch.tensor([20, 5]))
        >>> cache.lengths.tolist()
        [20, 5]
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        *,
        order: Order = "HND",
        begin: Tensor | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        k_zero: Tensor | float | None = None,
        v_zero: Tensor | float | None = None,
        k_channels: Tensor | None = None,
        hadamard: bool = False,
    ):
        _check_order(order)
        check_tensors(k=k, v=v, page_table=page_table, lengths=lengths)
        if k.dim() == 3 and v.dim() == 3:
            if page_table.dim() != 3:
                raise ValueError(
                    "page_table must have shape [B, Hk, max_pages] where pages belong to one head, "
                    f"got {tuple(page_table.shape)}"
                )
            heads = page_table.shape[1]
            k, v = (x[:, None].expand(-1, heads, -1, -1) for x in (k, v))
        elif order == "NHD":
            if min(k.dim(), v.dim()) < 3:
                raise ValueError(f"k and v must have 4 dimensions, got {k.dim()} and {v.dim()}")
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.k, self.v, self.page_table, self.lengths, self.begin = k, v, page_table, lengths, begin
        self.k_scale, self.v_scale, self.k_zero, self.v_zero = k_scale, v_scale, k_zero, v_zero
        self.view()
        self._transform_keys(k_channels, hadamard)

    @classmethod
    def from_packed(
        cls, kv: Tensor, page_table: Tensor, lengths: Tensor, *, axis: int = 1, **options: Any
    ) -> PagedKVCache:
        """K and V packed in one tensor.

        Args:
            kv: ``[P, 2, ...]`` with ``axis`` 1 (FlashInfer, vLLM), or 2 in another place, such as
                ``[2, P, ...]``; what is left without that dim is k and v in ``order``.
            options: as the constructor has them.
        """
        check_tensors(kv=kv)
        axis = as_int("axis", axis)
        if not -kv.dim() <= axis < kv.dim():
            raise ValueError(f"axis must be a dim of kv {tuple(kv.shape)}, got {axis}")
        if kv.shape[axis] != 2:
            raise ValueError(f"kv.shape[{axis}] must be 2 (K and V), got {kv.shape[axis]}")
        k, v = kv.unbind(axis)
        return cls(k, v, page_table, lengths, **options)

    @classmethod
    def from_csr(
        cls,
        k: Tensor,
        v: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        *,
        max_pages: int | None = None,
        order: Order = "HND",
        **options: Any,
    ) -> PagedKVCache:
        """Page tables in CSR form (FlashInfer).

        Args:
            indptr: ``[B + 1]`` ascending integers: sequence ``b`` has the pages
                ``indices[indptr[b]]`` up to ``indices[indptr[b + 1] - 1]``.
            indices: page ids.
            last_page_len: ``[B]`` integers in ``[0, page_size]``, keys in the last page; ignored
                for a sequence without pages.
            max_pages: most pages of a sequence. Required when the tensors are on an accelerator,
                because their values are then not read here.
        """
        _check_order(order)
        _check_pages_rank(k, v, (4,))
        page_size = k.shape[1 if order == "NHD" else 2]
        longest = _longest_row(indptr, indices, last_page_len, k.device, page_size)
        if max_pages is None:
            if longest is None:
                raise ValueError("max_pages must be given where indptr is on a device")
            max_pages = max(longest, 1)
        max_pages = as_int("max_pages", max_pages)
        if max_pages >= 2**31:
            raise ValueError(f"max_pages must be below 2**31, got {max_pages}")
        if max_pages < max(longest or 0, 1):
            raise ValueError(
                f"max_pages must be at least {max(longest or 0, 1)} (the longest row of indptr, "
                f"and at least 1), got {max_pages}"
            )
        indptr, indices, last_page_len = (x.long() for x in (indptr, indices, last_page_len))
        count = indptr.diff()
        page = torch.arange(max_pages, device=indptr.device)
        entry = (indptr[:-1, None] + page).clamp(0, max(indices.numel() - 1, 0))
        table = indices[entry] if indices.numel() else entry.new_zeros(entry.shape)
        table = to_int32(torch.where(page < count[:, None], table, 0))
        lengths = torch.where(count > 0, (count - 1) * page_size + last_page_len, 0)
        return cls(k, v, table, to_int32(lengths), order=order, **options)

    @classmethod
    def from_groups(
        cls, k: Tensor, v: Tensor, page_table: Tensor, lengths: Tensor, *,
        k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None,
        k_zero: Tensor | float | None = None, v_zero: Tensor | float | None = None,
        **options: Any,
    ) -> PagedKVCache:  # fmt: skip
        """Pages that belong to a group of ``G`` heads each: heads with like budgets share pages and
        a row of the table (Tangram, arXiv 2606.06302: ``page_group_size``).

        Args:
            k: ``[P, G, page_size, D]``; any strides in which the pages lie a multiple of the heads'
                stride apart. ``v`` likewise, the same multiple.
            page_table: ``[B, ceil(Hk / G), max_pages]`` integers: heads ``g * G`` to ``g * G + G -
                1`` have the pages of row ``g``, as many as the longest of them needs. It is read
                now: make another cache when it has changed.
            lengths: ``[B, Hk]`` integers, keys of each head.
            k_scale, v_scale, k_zero, v_zero: one number, or fp32 ``[P, G, page_size]`` in the same
                order of memory as k and v.
            options: as the constructor has them.

        Example::

            batch = allocator.append(names, counts)     # a sequence for each (sequence, group)
            table = batch.page_table.view(B, num_groups, -1)
            cache = PagedKVCache.from_groups(k, v, table, lengths)
        """
        check_tensors(k=k, v=v, page_table=page_table, lengths=lengths)
        _check_pages_rank(k, v, (4,))
        if page_table.dim() != 3 or lengths.dim() != 2:
            raise ValueError(
                "page_table must have shape [B, groups, max_pages] and lengths [B, Hk], got "
                f"{tuple(page_table.shape)} and {tuple(lengths.shape)}"
            )
        (pages, group_size), heads = k.shape[:2], lengths.shape[1]
        if page_table.shape[1] != -(-heads // max(group_size, 1)) or v.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"page_table must have a row for each {group_size} of {heads} heads, and v the "
                f"pages of k {tuple(k.shape[:2])}, got {page_table.shape[1]} rows and "
                f"{tuple(v.shape[:2])}"
            )
        scales: dict[str, Any] = {
            "k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero
        }  # fmt: skip
        step = _heads_per_page("k", k)
        rows = {name: x for name, x in scales.items() if isinstance(x, Tensor) and x.dim() == 3}
        for name, x in {"v": v, **rows}.items():
            if _heads_per_page(name, x) != step:
                raise ValueError(
                    f"{name} must have its pages as many heads apart as k ({step}), got "
                    f"{_heads_per_page(name, x)}"
                )
        for name, x in rows.items():
            scales[name] = _head_by_head(x, step)[:, None].expand(-1, heads, -1)
        head = torch.arange(heads, device=page_table.device)
        table = page_table.long()[:, head // group_size]
        exists = (table >= 0) & (table < pages)
        table = torch.where(exists, table * step + (head % group_size)[:, None], -1)
        return cls(
            _head_by_head(k, step), _head_by_head(v, step), to_int32(table), lengths, **scales,
            **options,
        )  # fmt: skip

    @classmethod
    def empty(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        format: str | None = None,
        zeros: bool = False,
        k_channels: Tensor | None = None,
        hadamard: bool = False,
        order: Order = "HND",
    ) -> PagedKVCache:
        """Pages in memory of their own, with no sequence; :meth:`at` gives it some.

        Args:
            format, zeros, k_channels, hadamard: as for :meth:`gqa_kernels.DenseKVCache.empty`.
            order: memory order.
        """
        _check_order(order)
        device = as_device(device)
        num_pages, page_size, num_kv_heads, head_dim, num_value_heads, value_head_dim = (
            checked_sizes(
                num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                num_value_heads=num_kv_heads if num_value_heads is None else num_value_heads,
                value_head_dim=head_dim if value_head_dim is None else value_head_dim,
            )
        )  # fmt: skip
        k_format, v_format = formats_of(format)
        where = (dtype, device, order == "NHD")
        k = empty_storage(num_pages, num_kv_heads, page_size, head_dim, k_format, *where)
        v = empty_storage(num_pages, num_value_heads, page_size, value_head_dim, v_format, *where)
        table = torch.zeros(0, 1, dtype=torch.int32, device=device)
        lengths = torch.zeros(0, dtype=torch.int32, device=device)
        return cls(
            k, v, table, lengths, k_channels=k_channels, hadamard=hadamard,
            **empty_scales(k, v, format, zeros),
        )  # fmt: skip

    def at(
        self, page_table: Tensor | PageBatch, lengths: Tensor | None = None,
        *, begin: Tensor | None = None,
    ) -> PagedKVCache:  # fmt: skip
        """The same memory with other sequences in it.

        Args:
            page_table, lengths: as the constructor has them; or a batch of a
                :class:`~gqa_kernels.PageAllocator`, whose pages to copy are copied.
        """
        if isinstance(page_table, PageBatch):
            batch, device = page_table, self.k.device
            self.copy_pages(batch.copies)
            found = self.at(batch.page_table.to(device), batch.lengths.to(device), begin=begin)
            if batch.next_positions is not None:
                found.next_positions = batch.next_positions.to(device)
            return found
        if lengths is None:
            raise TypeError("lengths must be given with a page_table in a tensor, got None")
        return PagedKVCache(
            self.k, self.v, page_table, lengths, begin=begin, k_channels=self.k_channels,
            hadamard=self.hadamard, **self.scales,
        )  # fmt: skip

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages ``(from, to)``, with their scales, as copy-on-write asks for."""
        pairs = _as_pairs(copies, self.k.shape[0])
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.k.device).unbind(1)
        for x in (self.k, self.v):
            x = x.view(torch.uint8) if x.element_size() == 1 else x
            x[target] = x[source]
        for rows in self.scales.values():
            if isinstance(rows, Tensor) and rows.dim() == 3:
                rows[target] = rows[source]

    def _parts(self) -> tuple[Tensor | float | None, ...]:
        return (
            self.k, self.v, self.lengths, self.page_table, self.begin, self.k_scale, self.v_scale,
            self.k_zero, self.v_zero,
        )  # fmt: skip

    def _create_view(self) -> KVView:
        return KVView.create(
            self.k, self.v, self.lengths, page_table=self.page_table, kv_begin=self.begin,
            **self.scales, check_values=False,
        )  # fmt: skip


def _longest_row(
    indptr: Tensor, indices: Tensor, last_page_len: Tensor, device: torch.device, page_size: int
) -> int | None:
    """Check the tensors of a CSR page table. Returns the most pages of a sequence, or None when the
    host can't read the values."""
    check_tensors(indptr=indptr, indices=indices, last_page_len=last_page_len)
    for name, x in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}.dtype must be int32 or int64, got {x.dtype}")
        if x.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got {x.dim()} {tuple(x.shape)}")
    if not len(indptr):
        raise ValueError("indptr must have at least 1 entry, got none")
    if len(last_page_len) != len(indptr) - 1:
        raise ValueError(
            f"last_page_len must have one entry per sequence ({len(indptr) - 1} by indptr), "
            f"got {len(last_page_len)}"
        )
    longest = None
    if is_readable(indptr):
        low, high = (int(x) for x in indptr.aminmax())
        count = indptr.long().diff()
        if low < 0 or high > len(indices) or (count < 0).any():
            raise ValueError(
                f"indptr must ascend within [0, len(indices) ({len(indices)})], "
                f"got {indptr.tolist()}"
            )
        longest = int(count.max()) if len(count) else 0
        if is_readable(last_page_len):
            wrong = (count > 0) & ((last_page_len < 0) | (last_page_len > page_size))
            if bool(wrong.any()):
                b = int(wrong.nonzero()[0])
                raise ValueError(
                    f"last_page_len must lie in [0, page_size ({page_size})], "
                    f"got {int(last_page_len[b])} at sequence {b}"
                )
    for name, x in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
        if x.device != device:
            raise ValueError(f"{name}.device must equal k.device ({device}), got {x.device}")
    return longest


def _heads_per_page(name: str, x: Tensor) -> int:
    """How many heads lie between two pages of ``[P, G, ...]``, those of other tensors included."""
    if x.shape[0] < 2 or x.shape[1] < 2:  # strides mean nothing
        return max(x.shape[1], 1)
    between, stride = x.stride(0), x.stride(1)
    if stride <= 0 or between % stride:
        raise ValueError(
            f"{name} must have pages a multiple of a head apart, got strides {x.stride()}"
        )
    return between // stride


def _head_by_head(x: Tensor, step: int) -> Tensor:
    """``[P, G, ...]`` as pages of one head: head ``g`` of page ``p`` is page ``p * step + g``."""
    pages, group_size = x.shape[:2]
    if not pages:
        return x.flatten(0, 1)
    stride = x.stride(1) if group_size > 1 else x.stride(0) // step
    return x.as_strided(((pages - 1) * step + group_size, *x.shape[2:]), (stride, *x.stride()[2:]))


def _check_pages_rank(k: Tensor, v: Tensor, ranks: tuple[int, ...]) -> None:
    check_tensors(k=k, v=v)
    for name, x in (("k", k), ("v", v)):
        if x.dim() not in ranks:
            allowed = " or ".join(map(str, ranks))
            raise ValueError(
                f"{name} must have {allowed} dimensions, got {x.dim()} (shape {tuple(x.shape)})"
            )


def _as_pairs(copies: object, num_pages: int) -> list[tuple[int, int]]:
    """Pages to copy, as integers in range."""
    if not isinstance(copies, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in copies
    ):
        raise TypeError(f"copies must be a sequence of pairs (from, to), got {shown(copies)}")
    pairs = [(as_int("copies", a), as_int("copies", b)) for a, b in copies]
    for page in (page for pair in pairs for page in pair):
        if not 0 <= page < num_pages:
            raise ValueError(f"pages of copies must lie in [0, {num_pages}), got {page}")
    return pairs


def _check_order(order: object) -> None:
    check_choice("order", order, ORDERS)
