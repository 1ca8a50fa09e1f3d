import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.triton.plan import build_plan, num_groups, plan_for
from gqa_kernels.testing import make_inputs


def test_groups():
    head_map = HeadMap([2, 0, 2, 3, 0])
    assert head_map.num_heads == len(head_map) == 5
    assert head_map.num_kv_heads == 4
    assert head_map.groups == ((1, 4), (), (0, 2), (3,))
    assert head_map.group_sizes == (2, 0, 2, 1)
    assert not head_map.is_uniform
    assert list(head_map) == [2, 0, 2, 3, 0] and head_map[3] == 3


def test_constructors():
    assert HeadMap.uniform(6, 3) == HeadMap([0, 0, 1, 1, 2, 2])
    assert HeadMap.from_group_sizes([3, 0, 2]) == HeadMap([0, 0, 0, 2, 2])
    assert HeadMap.from_group_sizes([1, 0]).num_kv_heads == 2
    assert HeadMap.from_groups([[0, 2], [1]]) == HeadMap([0, 1, 0])
    assert HeadMap(np.array([0, 1], dtype=np.int32)) == HeadMap((0, 1))
    assert HeadMap([0, 1], num_kv_heads=3) != HeadMap([0, 1])


def test_uniform_means_what_ordinary_kernels_compute():
    assert HeadMap.uniform(8, 2).is_uniform
    assert not HeadMap([0, 1, 0, 1]).is_uniform  # equal sizes, but interleaved
    assert not HeadMap([0, 0, 0, 1]).is_uniform  # divisible, but uneven
    assert not HeadMap([0, 0], num_kv_heads=2).is_uniform


def test_immutable_hashable_and_copied():
    head_map = HeadMap([0, 1, 1])
    head_map.tensor("cpu")
    with pytest.raises(AttributeError, match="immutable"):
        head_map.entries = (0,)
    assert len({head_map, HeadMap([0, 1, 1]), HeadMap([0, 1, 1], 3)}) == 2
    for copied in (
        copy.copy(head_map),
        copy.deepcopy(head_map),
        pickle.loads(pickle.dumps(head_map)),
    ):
        assert copied == head_map and hash(copied) == hash(head_map)
    assert eval(repr(head_map)) == head_map
    assert HeadMap.from_json(HeadMap([0, 1], 3).to_json()) == HeadMap([0, 1], 3)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: HeadMap([]), ValueError, "at least one entry"),
        (lambda: HeadMap([0, -1]), ValueError, r"must lie in \[0, 1\), got -1 at head 1"),
        (lambda: HeadMap([0, 5], 3), ValueError, r"must lie in \[0, 3\), got 5 at head 1"),
        (lambda: HeadMap([0, 1.0]), TypeError, "must be integers, got 1.0 at index 1"),
        (lambda: HeadMap([True, 0]), TypeError, "must be integers, got True"),
        (lambda: HeadMap.uniform(7, 2), ValueError, r"multiple of num_kv_heads \(2\), got 7"),
        (lambda: HeadMap.uniform(4, 0), ValueError, "multiple of num_kv_heads"),
        (lambda: HeadMap.from_group_sizes([2, -1]), ValueError, "non-negative"),
        (lambda: HeadMap.from_groups([[0], [0]]), ValueError, "each of the query heads once"),
        (lambda: HeadMap.from_groups([[0], [2]]), ValueError, "each of the query heads once"),
        (lambda: HeadMap.from_json("[0, 1]"), ValueError, "HeadMap JSON must be an object"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


head_maps = st.lists(st.integers(0, 6), min_size=1, max_size=24).map(
    lambda entries: HeadMap(entries, max(entries) + 1 + len(entries) % 2)
)


def unpack(plan: torch.Tensor, heads: int):
    plan = plan.tolist()
    return plan[:heads], plan[heads : 2 * heads], plan[2 * heads : 3 * heads], plan[3 * heads :]


@given(st.lists(st.integers(-2, 5), min_size=1, max_size=20), st.integers(1, 5))
def test_plan_of_any_map(entries, num_kv_heads):
    heads = len(entries)
    plan = build_plan(torch.tensor(entries), num_kv_heads, None, num_kv_heads)
    assert plan.dtype == torch.int32 and num_groups(plan, heads) == num_kv_heads
    perm, k_head, v_head, offsets = unpack(plan, heads)
    assert sorted(perm) == list(range(heads)) and k_head == v_head
    assert offsets[0] == 0 and offsets[-1] == heads
    for g in range(num_kv_heads):
        group = perm[offsets[g] : offsets[g + 1]]
        assert group == [h for h in range(heads) if entries[h] == g]
        assert set(k_head[offsets[g] : offsets[g + 1]]) <= {g}
    invalid = perm[offsets[num_kv_heads] :]
    assert invalid == [h for h in range(heads) if not 0 <= entries[h] < num_kv_heads]


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 4)), min_size=1, max_size=20),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_plan_of_two_maps(pairs, num_k_heads, num_v_heads):
    heads = len(pairs)
    k_map, v_map = (torch.tensor(x) for x in zip(*pairs, strict=True))
    plan = build_plan(k_map, num_k_heads, v_map, num_v_heads)
    groups = num_groups(plan, heads)
    assert groups == min(heads, num_k_heads * num_v_heads)
    perm, k_head, v_head, offsets = unpack(plan, heads)
    assert sorted(perm) == list(range(heads)) and offsets == sorted(offsets)
    valid = [p for p in pairs if 0 <= p[0] < num_k_heads and 0 <= p[1] < num_v_heads]
    seen = []
    for g in range(groups):
        members = range(offsets[g], offsets[g + 1])
        here = {(k_head[i], v_head[i]) for i in members}
        assert here == {pairs[perm[i]] for i in members}
        assert len(here) <= 1
        seen += here
    assert sorted(seen) == sorted(set(valid))  # each pair in use is one group
    assert all(pairs[perm[i]] not in valid for i in range(offsets[groups], heads))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: HeadMap.from_group_sizes([2**40]), ValueError, "the sum of sizes must be at most"),
        (
            lambda: HeadMap.from_group_sizes(itertools.repeat(0)),
            ValueError,
            r"len\(sizes\) must be",
        ),
        (lambda: HeadMap.uniform(2**40, 1), ValueError, "num_heads must be at most"),
        (lambda: HeadMap(itertools.repeat(0)), ValueError, r"len\(head_map\) must be at most"),
        (lambda: HeadMap([0], 2**40), ValueError, "num_kv_heads must be at most"),
        (lambda: HeadMap([2**40]), ValueError, "num_kv_heads must be at most"),
        (lambda: HeadMap([0], 1.0), TypeError, "num_kv_heads must be an integer, got 1.0"),
        (lambda: HeadMap(5), TypeError, "head_map must be a sequence, got 5"),
        (lambda: HeadMap.from_groups([0, 1]), TypeError, "groups must be a sequence, got 0"),
        (lambda: HeadMap.from_json("[" * 10**5), ValueError, "got a deep nest"),
        (lambda: HeadMap.from_json(None), TypeError, "HeadMap JSON must be a string, got None"),
        (
            lambda: HeadMap.from_json(json.dumps({"entries": "01", "num_kv_heads": 2})),
            TypeError,
            "head_map must be a sequence, got '01'",
        ),
        (
            lambda: HeadMap.from_json(json.dumps({"entries": [0], "num_kv_heads": 2**60})),
            ValueError,
            "num_kv_heads must be at most",
        ),
        (lambda: HeadMap([0, 0]).shard(0.5, 2), TypeError, "rank must be an integer, got 0.5"),
        (
            lambda: HeadMap([0, 0]).shard(0, 2, value_head_map=[0, 1]),
            TypeError,
            "value_head_map must be a HeadMap or None",
        ),
    ],
)
def test_hostile_maps_end_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_plan_is_built_once_for_a_head_map(device):
    head_map = HeadMap([0, 1, 1])
    q, k, v = make_inputs(1, head_map, 2, 3, 8, device=device)
    first = plan_for(attention_call(q, k, v, head_map))
    assert plan_for(attention_call(q, k, v, head_map)) is first
    both = plan_for(attention_call(q, k, v, head_map, value_head_map=[1, 0, 0]))
    assert both.numel() == 3 * 3 + 3 + 2 and both is not first
    listed = plan_for(attention_call(q, k, v, [0, 1, 1]))
    assert plan_for(attention_call(q, k, v, (0, 1, 1))) is listed


def test_tensors_made_in_inference_mode_serve_training():
    head_map = HeadMap([0, 0, 1])
    with torch.inference_mode():
        assert not head_map.tensor().is_inference()


@pytest.mark.parametrize("first", ["real", "fake"])
def test_kept_tensors_stay_in_their_mode(first):
    """A map used on real tensors and under FakeTensorMode, in either order."""
    head_map = HeadMap([0, 1, 1])
    q, k, v = make_inputs(1, head_map, 2, 3, 8)

    def real():
        assert asym_gqa_attention(q, k, v, head_map, softcap=2.0).isfinite().all()
        assert type(head_map.tensor()) is torch.Tensor and head_map.tensor().tolist() == [0, 1, 1]

    def fake():
        with FakeTensorMode() as mode:
            tensors = [mode.from_tensor(x) for x in (q, k, v)]
            out = asym_gqa_attention(*tensors, head_map, softcap=2.0)
            assert isinstance(out, FakeTensor) and out.shape == q.shape

    for step in (real, fake, real) if first == "real" else (fake, real, fake):
        step()


def test_meta_tensors_have_shapes():
    head_map = HeadMap([0, 1, 1])
    q, k, v = (x.to("meta") for x in make_inputs(1, head_map, 2, 3, 8))
    out, lse = asym_gqa_attention(q, k, v, head_map, causal=True, return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 3, 2) and out.is_meta
