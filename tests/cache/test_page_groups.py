"""Pages of a group of heads: the same as pages of one head each."""

import pytest
import torch

from gqa_kernels import HeadMap, PageAllocator, PagedKVCache, asym_gqa_decode
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.testing import assert_attention_close
from tests.cache.test_decode import USABLE, queries
from tests.cases.kept import random_kept

HEADS, DIM, PAGE = 5, 16, 4


def memory(layout, pages, group_size, device):
    """K and V ``[pages, group_size, PAGE, DIM]`` in some order of memory."""
    if layout == "packed":
        return torch.full((pages, 2, group_size, PAGE, DIM), torch.nan, device=device).unbind(1)
    if layout == "tokens first":
        shape = (2, pages, PAGE, group_size, DIM)
        return torch.full(shape, torch.nan, device=device).transpose(2, 3).unbind(0)
    return torch.full((2, pages, group_size, PAGE, DIM), torch.nan, device=device).unbind(0)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("layout", ["pages first", "packed", "tokens first"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
def test_appends_keeps_and_attends(backend, layout, group_size, device):
    """A prompt, other keys kept in each head, one token more: against the same keys, dense."""
    groups = -(-HEADS // group_size)
    allocator = PageAllocator(2 * groups * 4, PAGE)
    names = [allocator.allocate() for _ in range(2 * groups)]
    k, v = memory(layout, allocator.num_pages, group_size, device)

    def cache_of(batch, lengths):
        table = batch.page_table.view(2, groups, -1).to(device)
        return PagedKVCache.from_groups(k, v, table, lengths.to(device, torch.int32))

    new = torch.randn(2, 2, HEADS, 13, DIM, device=device)
    zeros = torch.zeros(2, HEADS)
    cache_of(allocator.append(names, 13), zeros).append(*new, backend=backend)
    kept, counts = random_kept([13, 13], HEADS, torch.Generator().manual_seed(group_size))
    longest = [
        int(counts[b, g * group_size : (g + 1) * group_size].max())
        for b in range(2)
        for g in range(groups)
    ]
    batch = allocator.keep(names, longest)
    cache_of(batch, zeros + 13).keep(kept.to(device), counts.to(device), backend=backend)
    assert allocator.num_free_pages == allocator.num_pages - sum(-(-n // PAGE) for n in longest)

    more = torch.randn(2, 2, HEADS, 1, DIM, device=device)
    cache = cache_of(allocator.append(names, 1), counts)
    cache.append(*more, backend=backend)
    dense = torch.zeros(2, 2, HEADS, 14, DIM, device=device)
    for b in range(2):
        for h in range(HEADS):
            n = int(counts[b, h])
            dense[:, b, h, :n] = new[:, b, h, kept[b, h, :n].to(device)]
            dense[:, b, h, n] = more[:, b, h, 0]
    head_map = HeadMap([0, 4, 1, 2, 3, 3, 0])
    q = queries(2, head_map, 1, DIM, torch.float32, device)
    out, lse = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
    lengths = (counts + 1).to(device)
    assert_attention_close(out, q, *dense, head_map, lse=lse, kv_lengths=lengths, causal=True)


def test_quantised_pages(device):
    pool = PagedKVCache.empty(6, PAGE, 2, DIM, dtype=torch.float32, device=device, format="int8")
    table = torch.tensor([[[4, 1], [0, 5]]], device=device)
    lengths = torch.tensor([[3, 7, 5]], device=device)
    grouped = PagedKVCache.from_groups(pool.k, pool.v, table, 0 * lengths, **pool.scales)
    new = torch.randn(2, 1, 3, 7, DIM, device=device)
    grouped.append(*new)
    grouped.lengths = lengths
    k, v, _ = gather(grouped.view())
    for h, n in enumerate([3, 7, 5]):
        for x, y in ((k, new[0]), (v, new[1])):
            step = y[0, h, :n].abs().amax(-1, keepdim=True) / 127
            assert ((x[0, h, :n] - y[0, h, :n]).abs() <= step * 0.501).all()


def test_pages_that_are_none(device):
    """Garbage in the table stays out of range, also where the product would wrap."""
    k = torch.zeros(3, 2, PAGE, DIM, device=device)
    table = torch.tensor([[[2, 2**31 - 1, -5]]], dtype=torch.int32, device=device)
    cache = PagedKVCache.from_groups(k, k, table, torch.tensor([[4, 3]], device=device))
    assert cache.page_table.tolist() == [[[4, -1, -1], [5, -1, -1]]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"page_table": torch.zeros(1, 2).int()}, r"page_table must have shape \[B, groups"),
        ({"lengths": torch.zeros(1).int()}, r"and lengths \[B, Hk\]"),
        ({"page_table": torch.zeros(1, 3, 1).int()}, "a row for each 2 of 3 heads"),
        ({"v": torch.zeros(4, 1, PAGE, DIM)}, r"the pages of k \(4, 2\)"),
        ({"v": torch.zeros(4, 2, 2, PAGE, DIM)[:, 0]},
         r"v must have its pages .* as k \(2\), got 4"),
        ({"k": torch.zeros(999).as_strided((4, 2, PAGE, DIM), (135, 64, DIM, 1))},
         r"k must have pages a multiple of a head apart, got strides \(135, 64, 16, 1\)"),
    ],
)  # fmt: skip
def test_errors(change, message):
    given = {
        "k": torch.zeros(4, 2, PAGE, DIM), "v": torch.zeros(4, 2, PAGE, DIM),
        "page_table": torch.zeros(1, 2, 1).int(), "lengths": torch.zeros(1, 3).int(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        PagedKVCache.from_groups(**given | change)
