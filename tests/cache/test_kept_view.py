"""Calls over caches on the CPU: what is looked at in every call, and the view that is kept."""

import copy

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_decode,
    available_backends,
    plan_decode,
)
from gqa_kernels.backends import dispatch
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.testing import assert_decode_close

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="no CPU kernels and no compiler"
)
MAP = HeadMap([0, 1, 1])
HEADS, DIM, SIZE, PAGES = 2, 8, 4, 5


@pytest.fixture(autouse=True)
def compiled():
    dispatch.BACKENDS["cpu"].prepare()


def paged(lengths=(6, 2), table=((0, 3), (4, 1)), dtype=torch.float32, **options):
    k, v = torch.randn(2, PAGES, HEADS, SIZE, DIM).to(dtype).unbind()
    numbers = (torch.tensor(x, dtype=torch.int32) for x in (table, lengths))
    return PagedKVCache(k, v, *numbers, **options)


def dense(lengths=(6, 2), **options):
    k, v = torch.randn(2, 2, HEADS, 2 * SIZE, DIM).unbind()
    return DenseKVCache(k, v, torch.tensor(lengths, dtype=torch.int32), **options)


def tokens(count=1, heads=HEADS, batch=2):
    return torch.randn(batch, heads, count, DIM)


CACHES = {
    "paged": paged,
    "dense": dense,
    "batch index": lambda: dense(batch_index=torch.tensor([1, 0], dtype=torch.int32)),
    "begin": lambda: paged((3, 1), begin=torch.tensor([2, 3], dtype=torch.int32)),
    "budgets": lambda: paged(((6, 3), (0, 2)), (((0, 1), (2, 0)), ((3, 0), (4, 0)))),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_plan_a_call_and_a_list_of_entries_agree(kind):
    cache = CACHES[kind]()
    other, q, new = copy.deepcopy(cache), tokens(2, heads=3), tokens(2)
    plan = plan_decode(q, cache, MAP)
    for options in ({}, {"k_new": new, "v_new": -new, "causal": False}):
        found = asym_gqa_decode(q, cache, MAP, return_lse=True, **options)
        want = asym_gqa_decode(q, other, list(MAP), return_lse=True, **options)
        assert all(map(torch.equal, found, want))
        assert torch.equal(cache.lengths, other.lengths)
        assert all(map(torch.equal, gather(cache.view()), gather(other.view())))
    assert torch.equal(plan(q, cache), asym_gqa_decode(q, cache, MAP))
    cache.lengths.sub_(2)
    cache.append(new, -new)
    assert all(map(torch.equal, gather(cache.view()), gather(other.view())))
    cache.lengths.sub_(2)
    stepped = plan(q, cache, new, -new)
    cache.advance(2)
    assert_decode_close(stepped, q, cache, MAP)


def over(**options):
    """A cache that became invalid after it was made."""
    cache = paged()
    for name, value in options.items():
        getattr(cache, name).copy_(torch.tensor(value, dtype=torch.int32))
    return cache


BAD_VALUES = {
    "length beyond the table": (lambda: over(lengths=(9, 2)), "at most the capacity .*got 9"),
    "negative length": (lambda: over(lengths=(-1, 2)), "non-negative, got -1"),
    "page id too large": (lambda: over(page_table=((0, 5), (4, 1))), "got 5 at sequence 0"),
    "negative page id": (lambda: over(page_table=((0, 3), (-1, 1))), "got -1 at sequence 1"),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_values_are_looked_at_in_every_call(kind):
    make, message = BAD_VALUES[kind]
    q, new = tokens(heads=3), tokens()
    for call in (
        lambda cache: cache.append(new, new),
        lambda cache: asym_gqa_decode(q, cache, MAP),
        lambda cache: asym_gqa_decode(q, cache, MAP, k_new=new, v_new=new),
        lambda cache: plan_decode(q, cache, MAP),
    ):
        cache = make()
        before = cache.lengths.clone()
        with pytest.raises(ValueError, match=message):
            call(cache)
        assert torch.equal(cache.lengths, before)


BAD_TOKENS = {
    "no room": (lambda: {"k_new": tokens(3), "v_new": tokens(3)}, ValueError, "got 9"),
    "heads": (lambda: {"k_new": tokens(heads=3)}, ValueError, "k_new must have shape"),
    "batch": (lambda: {"v_new": tokens(batch=1)}, ValueError, "v_new must have shape"),
    "dtype": (lambda: {"k_new": tokens().half()}, TypeError, "k_new.dtype must be"),
    "device": (lambda: {"v_new": tokens().to("meta")}, ValueError, "v_new.device"),
    "stride": (lambda: {"k_new": tokens().mT.contiguous().mT.expand(2, 2, 1, 8)[..., ::2]},
               ValueError, "stride|shape"),
    "type": (lambda: {"k_new": [1]}, TypeError, "k_new must be a torch.Tensor"),
    "alone": (lambda: {"v_new": None}, (TypeError, ValueError), "v_new"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_tokens_are_checked_and_nothing_is_counted(kind):
    change, error, message = BAD_TOKENS[kind]
    cache = paged()
    new = {"k_new": tokens(), "v_new": tokens()} | change()
    count = new["k_new"].shape[2] if isinstance(new["k_new"], torch.Tensor) else 1
    q = tokens(count, heads=3)
    plan = plan_decode(q, cache, MAP)
    for call in (
        lambda: cache.append(**new),
        lambda: asym_gqa_decode(q, cache, MAP, **new),
        lambda: plan(q, cache, **new),
    ):
        with pytest.raises(error, match=message):
            call()
        assert cache.lengths.tolist() == [6, 2]


BAD_QUERIES = {
    "head dim": (lambda: (torch.randn(2, 3, 1, 4), MAP), "head dim of q"),
    "batch": (lambda: (tokens(heads=3, batch=1), MAP), "batch"),
    "map": (lambda: (tokens(heads=4), MAP), "one entry per query head"),
    "heads of the map": (lambda: (tokens(heads=3), HeadMap([0, 2, 1])), "num_kv_heads"),
}


@pytest.mark.parametrize("kind", BAD_QUERIES)
def test_queries_are_checked_and_nothing_is_counted(kind):
    make, message = BAD_QUERIES[kind]
    q, head_map = make()
    cache, new = paged(), tokens()
    for options in ({}, {"k_new": new, "v_new": new}):
        with pytest.raises(ValueError, match=message):
            asym_gqa_decode(q, cache, head_map, **options)
        assert cache.lengths.tolist() == [6, 2]


def test_the_op_finds_what_the_checks_find():
    """Random lengths, begins and tables, right and wrong ones."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    outcomes = []
    for _ in range(150):
        heads = int(integers(1, 3, 1))
        cache = paged()
        cache.lengths = integers(-1 if len(outcomes) % 4 == 0 else 0, 7, 2, HEADS)[:, :heads]
        cache.lengths = cache.lengths[:, 0] if heads == 1 else cache.lengths
        cache.page_table = integers(0, PAGES + 1, 2, heads, 2).squeeze(1)
        cache.begin = integers(0, 4, 2) if len(outcomes) % 2 else None
        view = cache.unchecked_view()
        new = integers(0, 3, 1).item()
        offsets = torch.tensor([0, new, new + 1], dtype=torch.int32)
        for added in (new, offsets):
            try:
                view._check_lengths()
                view._check_slots(added if added is new else added.diff()[:, None])
                right = True
            except ValueError:
                right = False
            outcomes.append(right)
            assert view.has_slots(added) == right
    assert 20 < sum(outcomes) < len(outcomes) - 20


def test_the_view_is_kept_while_it_shares_the_memory():
    cache = paged()
    view = cache.view()
    assert cache.view() is view
    cache.advance(1)  # in place
    cache.page_table[1, 1] = 2
    assert cache.view() is view and view.kv_lengths[:, 0].tolist() == [7, 3]
    assert view.page_table[1, 0].tolist() == [4, 2]

    cache.lengths = torch.tensor([1, 1], dtype=torch.int32)
    assert cache.view() is not view and cache.view().kv_lengths[:, 0].tolist() == [1, 1]
    cache.lengths.set_(torch.tensor([2, 0], dtype=torch.int32))
    assert cache.view().kv_lengths[:, 0].tolist() == [2, 0]
    cache.page_table.resize_(2, 1)
    assert cache.view().capacity == SIZE
    cache.lengths = torch.tensor([2, 0])  # 64-bit: the view has a copy
    cache.view()
    cache.lengths[1] = 4
    assert cache.view().kv_lengths[:, 0].tolist() == [2, 4]
    cache.k = cache.k.double()
    with pytest.raises(NotImplementedError, match=r"v\.dtype must equal k\.dtype"):
        cache.view()

    other = copy.deepcopy(paged())
    assert other.view().kv_lengths.data_ptr() == other.lengths.data_ptr()


def test_scales_of_the_kept_view():
    cache = paged(dtype=torch.int8, k_scale=0.5, v_scale=torch.ones(HEADS))
    assert cache.view() is cache.view() and cache.view().v_scale[0, 1, 2] == 1
    cache.v_scale[1] = 3
    assert cache.view().v_scale[0, 1, 2] == 3
    cache.k_scale = 0.25
    assert cache.view().k_scale[0, 0, 0] == 0.25
    with torch.inference_mode():
        cache.k_scale = 0.125
        assert cache.view().k_scale.is_inference()
    assert not cache.view().k_scale.is_inference()
