"""Cutting head maps over ranks: whole, consistent, and optimal by brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_kernels import HeadMap


@st.composite
def maps_and_world(draw, most_heads=14, most_world=4):
    heads = draw(st.integers(1, most_heads))
    entries = st.lists(st.integers(0, 4), min_size=heads, max_size=heads)
    head_map = HeadMap(draw(entries), 6)  # the last group is empty
    value_map = HeadMap(draw(entries), 5) if draw(st.booleans()) else None
    return head_map, value_map, draw(st.integers(1, min(heads, most_world)))


def shards(head_map, value_map, world, **costs):
    return [head_map.shard(r, world, value_head_map=value_map, **costs) for r in range(world)]


@settings(max_examples=30)
@given(maps_and_world())
def test_shards_partition_the_query_heads_and_keep_what_each_reads(case):
    head_map, value_map, world = case
    seen = []
    for shard in shards(head_map, value_map, world):
        assert shard.query_heads and list(shard.query_heads) == sorted(shard.query_heads)
        seen += shard.query_heads
        local_value_map = shard.head_map if value_map is None else shard.value_head_map
        for local, h in enumerate(shard.query_heads):
            assert shard.kv_heads[shard.head_map[local]] == head_map[h]
            expected = head_map if value_map is None else value_map
            assert shard.value_heads[local_value_map[local]] == expected[h]
        assert set(shard.head_map) == set(range(len(shard.kv_heads)))
        assert set(local_value_map) == set(range(len(shard.value_heads)))
    assert sorted(seen) == list(range(head_map.num_heads))


def scored(ranks, head_map, value_map, query_cost, kv_cost):
    """Largest load and heads held, of lists of query heads per rank; in half units."""
    value_map = value_map or head_map
    held = [len({head_map[h] for h in r}) + len({value_map[h] for h in r}) for r in ranks]
    loads = [2 * query_cost * len(r) + kv_cost * n for r, n in zip(ranks, held, strict=True)]
    return max(loads), sum(held)


@settings(max_examples=25)
@given(maps_and_world(most_heads=7, most_world=3), st.sampled_from([(1, 1), (1, 4), (3, 1)]))
def test_no_cut_is_better(case, costs):
    head_map, value_map, world = case
    best = min(
        scored(ranks, head_map, value_map, *costs)
        for cut in itertools.product(range(world), repeat=head_map.num_heads)
        if all(ranks := [[h for h, r in enumerate(cut) if r == rank] for rank in range(world)])
    )
    ours = shards(head_map, value_map, world, query_cost=costs[0], kv_cost=costs[1])
    assert scored([s.query_heads for s in ours], head_map, value_map, *costs) == best


def test_even_maps_that_divide_are_cut_as_ordinary_tensor_parallelism_does():
    for rank, shard in enumerate(shards(HeadMap.uniform(32, 8), None, 4)):
        assert shard.query_heads == tuple(range(8 * rank, 8 * rank + 8))
        assert shard.kv_heads == (2 * rank, 2 * rank + 1)


def test_replicated_only_where_it_lowers_the_maximum():
    uneven = HeadMap.from_group_sizes([9, 7, 5, 4, 3, 2, 1, 1])
    assert sum(len(s.kv_heads) for s in shards(uneven, None, 2)) == 8
    # 32 query and 8 KV heads over 8 ranks: 6 needs replicas (the largest group alone costs 10).
    eight = shards(uneven, None, 8)
    assert max(len(s.query_heads) + len(s.kv_heads) for s in eight) == 6
    # Where KV heads weigh much, none is replicated though the query heads are then uneven.
    assert sum(len(s.kv_heads) for s in shards(uneven, None, 4, kv_cost=100)) == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2, "world": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"rank": 0, "world": 3}, r"world must lie in \[1, 2\], got 3"),
        ({"rank": 0, "world": 2, "query_cost": 0}, "query_cost must be at least 1"),
        ({"rank": 0, "world": 2, "value_head_map": HeadMap([0])}, "must have 2 entries, got 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        HeadMap([0, 0]).shard(**options)
