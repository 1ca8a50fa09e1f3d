"""Allocations of query heads by key norms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_kernels.grouping.search.key_norm import key_norm_sizes
from gqa_kernels.nn.allocation import (
    KeyNormAllocation,
    allocate,
    contiguous_map,
    key_norms,
    largest_remainders,
)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(1, 64))
def test_largest_remainders(shares, total):
    sizes = largest_remainders(torch.tensor(shares, dtype=torch.float64), total)
    assert sizes.sum() == total and (sizes >= 0).all()
    if sum(shares) > 0:
        quotas = torch.tensor(shares, dtype=torch.float64) / sum(shares) * total
        assert ((sizes - quotas).abs() < 1 + 1e-6).all()


def test_largest_remainders_of_known_shares():
    def sizes(shares, total):
        return largest_remainders(torch.tensor(shares), total).tolist()

    assert sizes([1.0, 2.0, 3.0], 12) == [2, 4, 6]
    assert sizes([1.0, 1.0, 1.0], 4) == [2, 1, 1]  # of equals, the first
    assert sizes([0.0, 0.0], 3) == [2, 1]
    assert sizes([0.0, 5.0], 3) == [0, 3]
    assert sizes([float("nan"), 1.0, 1.0], 4) == [0, 2, 2]


@pytest.mark.parametrize("rule, shift", [("kdgqa", True), ("dgqa", False)])
def test_agrees_with_the_search_methods_of_that_name(rule, shift):
    for seed in range(20):
        norms = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        shares = norms - norms.min() if shift else norms
        assert largest_remainders(shares, 12).tolist() == key_norm_sizes(norms.numpy(), 12, rule)


def test_contiguous_map():
    assert contiguous_map(torch.tensor([2, 0, 3, 1]), 6).tolist() == [0, 0, 2, 2, 2, 3]


def test_key_norms():
    k = torch.randn(2, 5, 3, 4)  # [B, S, Hkv, D]
    expected = [sum(k[b, :, g].norm().item() for b in range(2)) for g in range(3)]
    torch.testing.assert_close(key_norms(k), torch.tensor(expected))


def keys_with_norms(norms):
    return torch.tensor(norms)[None, None, :, None].clone()


def test_kdgqa_gives_the_smallest_none():
    head_map = torch.zeros(8, dtype=torch.int32)
    allocation = KeyNormAllocation("kdgqa", 8, 3)
    allocation.observe(keys_with_norms([3.0, 1.0, 2.0]), head_map)
    assert head_map.tolist() == allocate(torch.tensor([2.0, 0.0, 1.0]), 8).tolist()
    assert 1 not in head_map and head_map.bincount().tolist()[0] == 5


def run(kind, norms_by_step, window=2, num_heads=8):
    """Maps after each step."""
    head_map = torch.full((num_heads,), 1, dtype=torch.int32)
    allocation = KeyNormAllocation(kind, num_heads, 2, window)
    maps = []
    for norms in norms_by_step:
        allocation.observe(keys_with_norms(norms), head_map)
        allocation.observe(keys_with_norms(norms), head_map)  # recomputed: nothing changes
        allocation.step(head_map)
        maps.append(head_map.bincount(minlength=2).tolist())
    return maps


def test_dgqa_ema():
    maps = run("dgqa-ema", [[9.0, 9.0], [1.0, 3.0], [9.0, 9.0], [3.0, 1.0]])
    # Nothing within a window; at the first its norms, then 0.9 n + 0.1 of the average.
    assert maps == [[0, 8], [2, 6], [2, 6], [6, 2]]
    assert allocate(
        0.9 * torch.tensor([3.0, 1.0]) + 0.1 * torch.tensor([1.0, 3.0]), 8
    ).tolist() == ([0] * 6 + [1] * 2)


def test_dgqa_difference():
    maps = run("dgqa-diff", [[9.0, 9.0], [1.0, 3.0], [9.0, 9.0], [4.0, 4.0]])
    assert maps == [[0, 8], [2, 6], [2, 6], [6, 2]]  # |4 - 1| : |4 - 3|


@pytest.mark.parametrize(
    "kind, window, message",
    [("gqa", 300, "allocation must be one of kdgqa, "), ("kdgqa", 0, "window must be at least 1")],
)
def test_bad_arguments(kind, window, message):
    with pytest.raises(ValueError, match=message):
        KeyNormAllocation(kind, 8, 2, window)
