"""HeadPages: the keys and values of one layer in pages of one head each, with a length per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends.reference.cache import gather
from ...cache.allocator import PageAllocator
from ...cache.hadamard import rotate_by_hadamard
from ...cache.paged import PagedKVCache

SPARE = 8  # a full pool grows by an eighth of itself


class HeadPages:
    """Pages of the heads of a layer. Sequence ``b * Hk + h`` of the allocator is head ``h`` of row
    ``b``.

    Args:
        k, v: ``[B, Hk, ., D]`` and ``[B, Hk, ., Dv]``, tensors like the ones to hold.
        page_size, format, zeros, hadamard: as :meth:`gqa_kernels.PagedKVCache.empty` has them.
    """

    def __init__(
        self, k: Tensor, v: Tensor, page_size: int, format: str | None, zeros: bool = False,
        hadamard: bool = False,
    ):  # fmt: skip
        self.batch, self.heads = k.shape[:2]
        self.num_heads = self.batch * self.heads
        self._dims, self._dtype, self._device = (k.shape[3], v.shape[3]), k.dtype, k.device
        self._page_size, self._format, self._zeros = page_size, format, zeros
        self._hadamard = hadamard
        self._take(0)

    @property
    def lengths(self) -> Tensor:
        """int32 ``[B, Hk]`` on the CPU: keys of each head."""
        found = [self.allocator.length(name) for name in self._names]
        return torch.tensor(found, dtype=torch.int32).view(self.batch, self.heads)

    @property
    def nbytes(self) -> int:
        """Bytes of K, V and scales, spare pages included."""
        held = (self.pool.k, self.pool.v, *self.pool.scales.values())
        return sum(x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor))

    def append(
        self, k: Tensor, v: Tensor, counts: Sequence[int], backend: str, exact: bool = False
    ) -> PagedKVCache:
        """Store new keys and values behind each head's.

        Args:
            k, v: ``[total, D]`` and ``[total, Dv]``, the heads of the rows one after another.
            counts: new keys of each of the ``B * Hk`` heads.
            exact: take no spare pages.

        Returns:
            the cache with them, ``[B, Hk]`` lengths.
        """
        missing = self.allocator.pages_needed(self._names, counts) - self.allocator.num_free_pages
        if missing > 0:
            spare = 0 if exact else self.allocator.num_pages // SPARE
            self._grow(max(missing, spare))
        batch = self.allocator.append(self._names, counts)
        each = self.pool.at(batch)
        offsets = torch.tensor([0, *counts]).cumsum(0).to(self._device)
        each.append(
            k[:, None], v[:, None], cu_seqlens=offsets, max_seqlen=max(counts), backend=backend
        )
        return self._by_head(each)

    def keep(self, kept: Tensor, backend: str) -> None:
        """Keep the keys that a mask ``[B, Hk, n]`` over the stored keys shows; return the memory of
        the others."""
        counts = kept.sum(-1).flatten().tolist()
        cache = self._by_head(self.pool.at(self.allocator.keep(self._names, counts)))
        cache.keep(kept, backend=backend)
        if self.allocator.num_free_pages:
            self._shrink()

    def discard(self, head: int, keys: int, begin: int) -> None:
        """Forget whole pages of a head's keys, from key ``begin`` on.

        Args:
            head: ``b * Hk + h``.
            keys, begin: multiples of the page size.
        """
        self.allocator.discard(self._names[head], keys, begin)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first keys of each head only."""
        for name, length in zip(self._names, lengths, strict=True):
            self.allocator.truncate(name, length)

    def dense(self) -> tuple[Tensor, Tensor]:
        """A copy of keys and values as ``[B, Hk, longest, D]``, 0 beyond a head's length."""
        cache = self._by_head(self.pool.at(self.allocator.batch(self._names)))
        k, v, _ = gather(cache.view())
        k = rotate_by_hadamard(k) if self._hadamard else k
        longest = int(cache.lengths.max()) if cache.lengths.numel() else 0
        return k[:, :, :longest].to(self._dtype), v[:, :, :longest].to(self._dtype)

    def _by_head(self, each: PagedKVCache) -> PagedKVCache:
        """The sequences of one head as sequences of all heads."""
        shape = (self.batch, self.heads)
        scales = {
            name: None if x is None else x.expand(-1, self.heads, -1)
            for name, x in each.scales.items()
        }
        return PagedKVCache(
            each.k[:, 0], each.v[:, 0], each.page_table.view(*shape, -1), each.lengths.view(shape),
            hadamard=each.hadamard, **scales,
        )  # fmt: skip

    def _take(self, pages: int) -> None:
        """An empty pool of so many pages, and sequences without keys."""
        self.allocator = PageAllocator(pages, self._page_size)
        self._names = [self.allocator.allocate() for _ in range(self.num_heads)]
        self.pool = self._empty(pages)

    def _empty(self, pages: int) -> PagedKVCache:
        return PagedKVCache.empty(
            pages, self._page_size, 1, self._dims[0], value_head_dim=self._dims[1],
            dtype=self._dtype, device=self._device, format=self._format,
            zeros=self._zeros, hadamard=self._hadamard,
        )  # fmt: skip

    def _grow(self, pages: int) -> None:
        old = self.pool
        self.allocator.grow(pages)
        self.pool = self._empty(self.allocator.num_pages)
        _copy_pages(old, slice(len(old.k)), self.pool, slice(len(old.k)))

    def _shrink(self) -> None:
        """Move the pages in use to a pool of just these."""
        old, allocator, names = self.pool, self.allocator, self._names
        source = [page for name in names for page in allocator.pages(name)]
        self._take(len(source))
        self.allocator.append(self._names, [allocator.length(name) for name in names])
        target = [page for name in self._names for page in self.allocator.pages(name)]
        _copy_pages(old, source, self.pool, target)


def _copy_pages(
    old: PagedKVCache, source: slice | list[int], new: PagedKVCache, target: slice | list[int]
) -> None:
    """Copy pages with their scales from one pool to another."""
    for name in ("k", "v", *old.scales):
        x, y = getattr(old, name), getattr(new, name)
        if isinstance(x, Tensor):
            if x.element_size() == 1:
                x, y = x.view(torch.uint8), y.view(torch.uint8)
            y[target] = x[source]
