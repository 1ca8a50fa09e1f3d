"""Tensors between guard pages: a read or write outside a tensor's storage ends the process.

Each storage is a mapping of its own with an inaccessible page before and after it. It touches one
of the two (the caller's random source decides), so that an overrun on that side is noticed from its
first byte. What a view leaves out of its storage is NaN, or -1 for integers.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Sequence

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_INACCESSIBLE = 0  # PROT_NONE


def guarded(count: int, dtype: torch.dtype, at_end: bool) -> Tensor:
    """``count`` elements of poison between guard pages, at the end of the pages or the start."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    if dtype != torch.bool:
        region[offset : offset + size] = b"\xff" * size
    first = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (first, first + mmap.PAGESIZE + pages):
        if _libc.mprotect(page, mmap.PAGESIZE, _INACCESSIBLE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset)


class Memory:
    """Places tensors for one call.

    Args:
        source: decides on which side of its pages a storage lies, and the strides.
    """

    def __init__(self, source: random.Random):
        self.source = source

    def place(
        self,
        x: Tensor,
        strided: bool = False,
        last_dim_free: bool = False,
        writable: bool = False,
    ) -> Tensor:
        """The same values between guard pages.

        Args:
            strided: dims in a random order and with gaps; the last one stays contiguous, unless
                ``last_dim_free``. Where values repeat along a dim its stride may be 0, unless
                ``writable``.
        """
        source, dims = self.source, list(range(x.dim()))
        strided = strided and x.dim() > 0
        gaps = [0] * x.dim()
        if strided:
            moving = dims if last_dim_free else dims[:-1]
            source.shuffle(moving)
            dims = moving if last_dim_free else [*moving, x.dim() - 1]
            gaps = [source.choice((0, 0, 1, 3)) for _ in dims]
        strides, step = [0] * x.dim(), 1
        for dim in reversed(dims):
            strides[dim] = step
            step *= max(1, x.shape[dim]) + gaps[dim]
        values = x
        if strided and x.numel() and not writable:
            for dim in dims[:-1]:
                if x.shape[dim] > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
                    strides[dim] = source.choice((0, strides[dim]))
                    if strides[dim] == 0:
                        values = values.narrow(dim, 0, 1)
        extent = _extent(x.shape, strides)
        placed = guarded(extent, x.dtype, source.random() < 0.6).as_strided(x.shape, strides)
        if x.numel():
            placed.as_strided(values.shape, strides).copy_(values)
        return placed


def storage_bytes(x: Tensor) -> Tensor:
    """A copy of everything in a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
