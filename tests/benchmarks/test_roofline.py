"""Bytes and operations against cases counted by hand."""

import itertools

import pytest

from benchmarks.measure.roofline import (
    Bound,
    Work,
    attention_work,
    bound,
    visible_keys,
    visible_pairs,
)
from gqa_kernels import HeadMap

UNEVEN = HeadMap([0, 0, 0, 1])


def test_decode_reads_each_kv_head_once():
    # q and out: 2 x 4 heads x 64; K and V: 2 x 2 heads x 100 keys x 64; 2 bytes each.
    work = attention_work(UNEVEN, 1, 1, 100, 64, 2)
    assert work.bytes == 2 * (2 * 4 * 64 + 2 * 2 * 100 * 64)
    # 4 heads x 100 keys x 64 multiply-adds, two products.
    assert work.flops == 2 * 2 * 4 * 100 * 64


def test_group_shape_does_not_matter_but_unread_heads_do():
    even = attention_work(HeadMap.uniform(4, 2), 3, 1, 50, 8, 4)
    assert attention_work(UNEVEN, 3, 1, 50, 8, 4) == even
    with_empty = attention_work(HeadMap([0, 0, 0, 2], num_kv_heads=4), 3, 1, 50, 8, 4)
    assert with_empty == even


def test_a_bias_is_read_once_for_all_sequences():
    plain = attention_work(UNEVEN, 2, 5, 7, 8, 4)
    biased = attention_work(UNEVEN, 2, 5, 7, 8, 4, bias_per_head=True)
    assert biased.bytes - plain.bytes == 4 * 4 * 5 * 7 and biased.flops == plain.flops


def test_causal_prefill():
    # 5 queries: 1 + 2 + 3 + 4 + 5 pairs.
    work = attention_work(UNEVEN, 2, 5, 5, 8, 4, causal=True)
    assert work.flops == 2 * 2 * (4 * 15 * 8) * 2
    assert work.bytes == 4 * 2 * (2 * 4 * 5 * 8 + 2 * 2 * 5 * 8)


def test_causal_is_aligned_to_the_last_key():
    # 2 queries over 5 keys see 4 and 5 of them.
    assert visible_pairs(2, 5, None, 0) == 9
    # 3 queries over 1 key: only the last sees it.
    assert visible_pairs(3, 1, None, 0) == 1


def test_window_leaves_out_keys_and_pairs():
    # Queries at positions 6, 7, 8, 9 of 10, two keys back: 3 pairs each, keys 4 to 9.
    assert visible_pairs(4, 10, 2, 0) == 12
    assert visible_keys(4, 10, 2) == 6
    work = attention_work(HeadMap([0]), 1, 4, 10, 8, 2, causal=True, window=(2, None))
    assert work == Work(bytes=2 * (2 * 4 * 8 + 2 * 6 * 8), flops=2 * 2 * 12 * 8)


@pytest.mark.parametrize(
    "left, right", [(None, None), (None, 0), (3, 0), (0, 0), (2, 1), (9, None)]
)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 7), (4, 7), (7, 4), (5, 5), (2, 0), (0, 3)])
def test_counts_agree_with_a_written_out_mask(q_len, kv_len, left, right):
    seen = [
        (i, j)
        for i, j in itertools.product(range(q_len), range(kv_len))
        if (left is None or j >= i + kv_len - q_len - left)
        and (right is None or j <= i + kv_len - q_len + right)
    ]
    assert visible_pairs(q_len, kv_len, left, right) == len(seen)
    assert visible_keys(q_len, kv_len, left) == len({j for _, j in seen})


def test_lengths_and_value_dims_and_maps():
    values = HeadMap([0, 1, 2, 2])
    work = attention_work(
        UNEVEN, 2, 1, 100, 8, 2, value_head_dim=16, value_head_map=values, kv_lengths=[10, 0]
    )
    assert work.bytes == 2 * (2 * 4 * (8 + 16) + 10 * (2 * 8 + 3 * 16))
    assert work.flops == 2 * (8 + 16) * 4 * 10


def test_bound_is_the_larger_time():
    assert bound(Work(100, 10), 50.0, 100.0) == Bound(2.0, "memory")
    assert bound(Work(100, 1000), 50.0, 100.0) == Bound(10.0, "compute")
