"""write: tokens at slots, on every backend, against an append to the same slots."""

import pytest
import torch

from gqa_kernels import PagedKVCache
from gqa_kernels.backends.reference.cache import gather
from tests.cache.test_append import stored
from tests.cache.test_decode import USABLE, filled
from tests.cases.caches import Kind

KINDS = [
    Kind(), Kind(batch_index=True, format="int4", zeros=True), Kind(1), Kind(3, "NHD"),
    Kind(16, "packed"), Kind(16, format="int8", zeros=True), Kind(64, format="fp8_e4m3"),
]  # fmt: skip


def slots_of(cache, tokens):
    """Slots of tokens ``(sequence, position)`` by the cache's own table."""
    view = cache.view()
    found = []
    for b, j in tokens:
        page = b if view.page_table is None else int(view.page_table[b, 0, j // view.page_size])
        found.append(page * view.page_size + j % view.page_size)
    return torch.tensor(found, device=view.device)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_writes_what_an_append_writes(backend, kind, device):
    """Sequences of 37, 0 and 5 tokens get one token more, in any order; others are dropped."""
    dtype = torch.float32 if kind.format else torch.bfloat16
    caches = [filled(kind, dtype, device, room=True)[0] for _ in range(2)]
    dim = caches[0].view().value_head_dim
    k, v = (torch.randn(3, 3, n, device=device).to(dtype) for n in (16, dim))
    caches[0].append(k[:, :, None], v[:, :, None], backend="reference")
    slots = slots_of(caches[1], [(0, 37), (1, 0), (2, 5)])
    order = torch.tensor([2, 0, 1], device=device)
    slots = torch.cat([slots[order], torch.tensor([-1, -7, 10**12], device=device)])
    many = [torch.cat([x[order], x]) for x in (k, v)]
    caches[1].write(*many, slots, backend=backend)
    assert caches[1].lengths.tolist() == [37, 0, 5]
    for x, y in zip(*map(stored, caches), strict=True):
        assert torch.equal(x, y)


def test_pages_of_one_head_each(device):
    """A page holds one head, so a slot is a token of every head in the page of that number."""
    k = torch.zeros(4, 2, 8, device=device)
    table = torch.tensor([[[0], [1]]], device=device)
    cache = PagedKVCache(k, k.clone(), table, torch.zeros(1, 2, dtype=torch.int32, device=device))
    new = torch.ones(1, 2, 8, device=device)
    cache.write(new, new, torch.tensor([5], device=device))
    assert k[2, 1].eq(1).all() and k.sum() == 8
    assert not gather(cache.view())[0].any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"slot_mapping": torch.zeros(2)}, TypeError, "slot_mapping.dtype must be int32 or int64"),
        ({"slot_mapping": torch.zeros(3).int()}, ValueError, r"must have shape \(2,\)"),
        ({"slot_mapping": [0, 1]}, TypeError, "slot_mapping must be a torch.Tensor, got list"),
        ({"k_new": torch.zeros(2, 3, 16, 1)}, ValueError, "k_new must have 3 dimensions, got 4"),
        ({"v_new": torch.zeros(2, 2, 24)}, ValueError, "v_new must have shape"),
        ({"v_new": torch.zeros(2, 3, 24).double()}, TypeError, "v_new.dtype must be"),
    ],
)
def test_errors(change, error, message):
    cache, _ = filled(Kind(16), torch.float32, "cpu", room=True)
    before = [x.clone() for x in stored(cache)]
    given = {
        "k_new": torch.zeros(2, 3, 16), "v_new": torch.zeros(2, 3, 24),
        "slot_mapping": torch.tensor([0, 1]),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        cache.write(**given | change)
    assert all(map(torch.equal, stored(cache), before))
