"""Memory of caches."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

SMALLEST = 1 << 22  # bytes; huge pages are of 2 MiB if pages are of 4 KiB


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """:func:`torch.empty`, on a CPU in huge pages if the operating system has some.

    Attention walks over a cache in runs of one head's keys, of 4 KiB in a page of 16 tokens of 128
    bf16 numbers: with ordinary pages each run waits for an address translation of its own.
    """
    x = torch.empty(*shape, dtype=dtype, device=device)
    size = x.untyped_storage().nbytes()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    compiling = torch.compiler.is_compiling()
    if advice is None or compiling or x.device.type != "cpu" or size < SMALLEST:
        return x
    if type(x) is Tensor:  # not of a subclass without memory
        address = x.data_ptr()
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        libc = ctypes.CDLL(None)
        # Advice: if it is refused, pages stay as they are.
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), advice)
    return x
