"""Memory of caches."""

from __future__ import annotations

import sys

import pytest
import torch

from gqa_kernels import DenseKVCache, PagedKVCache


def flags(address: int) -> list[str]:
    """Linux's flags of the memory mapping that contains an address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(x, 16) for x in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "VmFlags:":
                return line.split()[1:]
    raise LookupError(hex(address))


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages by advice are Linux's")
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_large_caches_ask_for_huge_pages(order):
    try:
        open("/sys/kernel/mm/transparent_hugepage/enabled").close()
    except OSError:
        pytest.skip("a kernel without transparent huge pages")
    cache = PagedKVCache.empty(512, 16, 8, 128, order=order)
    for x in (cache.k, cache.v):
        assert "hg" in flags(x.data_ptr() + x.untyped_storage().nbytes() // 2)
    small = DenseKVCache.empty(1, 2, 16, 8)
    small.k.zero_()
    assert torch.equal(small.k, torch.zeros_like(small.k))


def test_traced_allocations():
    with torch._subclasses.FakeTensorMode():
        assert PagedKVCache.empty(512, 16, 8, 128).k.shape == (512, 8, 16, 128)
    assert DenseKVCache.empty(4, 8, 4096, 64, device="meta").k.is_meta
