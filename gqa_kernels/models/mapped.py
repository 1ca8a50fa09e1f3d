"""Weights that stay on disk: drop the resident pages of tensors that are views of mapped files.

transformers maps safetensors files into memory and reads a weight when it is first used. The pages
then stay resident until memory is short, so a model larger than memory limits looks as large as its
checkpoint. ``release`` drops the pages of some tensors. The next use reads them again.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_SMAPS = Path("/proc/self/smaps")
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +/")


def release(tensors: Iterable[Tensor]) -> int:
    """Drop the resident pages of tensors in mapped files. Tensors in ordinary memory, and mappings
    that were written to, are left alone.

    Returns:
        The bytes whose pages were dropped; 0 where the system has no ``/proc/self/smaps``.
    """
    spans = [
        (t.data_ptr(), t.numel() * t.element_size()) for t in tensors if t.device.type == "cpu"
    ]
    mappings = _clean_files()
    starts, dropped = [low for low, _ in mappings], 0
    libc = ctypes.CDLL(None, use_errno=True) if mappings else None
    for start, size in spans:
        place = bisect_right(starts, start) - 1
        if libc is None or place < 0 or start + size > mappings[place][1]:
            continue
        # Whole pages only: a page at either end may belong to a neighbour, which would read it
        # again without harm, but a range must begin at a page.
        low = start - start % mmap.PAGESIZE
        length = start + size - low
        if libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(length), mmap.MADV_DONTNEED) == 0:
            dropped += length
    return dropped


def _clean_files() -> list[tuple[int, int]]:
    """``(begin, end)`` of every mapped file without pages of its own (written to), ascending."""
    if not _SMAPS.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return []
    found, current = [], None
    with _SMAPS.open() as lines:
        for line in lines:
            head = _HEAD.match(line)
            if head is not None:
                current = int(head[1], 16), int(head[2], 16)
            elif line.startswith("Anonymous:"):
                if current is not None and line.split()[1] == "0":
                    found.append(current)
                current = None
    return sorted(found)
