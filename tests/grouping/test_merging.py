"""Merging methods on plain tensors."""

import pytest
import torch

from gqa_kernels.grouping.merging import MERGING, merge

BLOCKS = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", MERGING)
def test_single_heads_are_copied_exactly(method):
    out = merge(BLOCKS, [[2, 2, 2], [0], [1, 1]], method)
    assert torch.equal(out, BLOCKS[[2, 0, 1]])


def test_mean_counts_query_heads():
    out = merge(BLOCKS, [[0, 1, 1], [2]], "mean")
    torch.testing.assert_close(out[0], (BLOCKS[0] + 2 * BLOCKS[1]) / 3)


def test_mean_minimises_the_squared_distance_to_its_members():
    merged = merge(BLOCKS.double(), [[0, 1, 2, 2]], "mean")[0]
    members = BLOCKS.double()[[0, 1, 2, 2]]
    best = ((members - merged) ** 2).sum()
    for step in torch.randn(20, 2, 5, generator=torch.Generator().manual_seed(1)).double():
        assert ((members - merged - 0.1 * step) ** 2).sum() > best


def test_dtype_and_input_are_kept():
    blocks = BLOCKS.bfloat16()
    before = blocks.clone()
    assert merge(blocks, [[0, 1], [2]], "mean").dtype == torch.bfloat16
    assert torch.equal(blocks, before)


def test_none_refuses_to_mix():
    with pytest.raises(ValueError, match=r"got KV head 1 .*\[0, 2\]"):
        merge(BLOCKS, [[1], [2, 0]], "none")


def test_none_takes_equal_heads_together():
    blocks = BLOCKS[[0, 1, 0]]
    assert torch.equal(merge(blocks, [[2, 0], [1]], "none"), BLOCKS[:2])


def test_empty_group():
    with pytest.raises(ValueError, match=r"got none for \[0\]"):
        merge(BLOCKS, [[], [0, 1, 2]], "mean")


def test_unknown_method():
    with pytest.raises(ValueError, match="merging must be one of none, mean, got 'max'"):
        merge(BLOCKS, [[0, 1, 2]], "max")
