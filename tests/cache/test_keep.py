"""keep: the kept keys come first, nothing else changes, and attention reads them alone."""

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PageAllocator,
    PagedKVCache,
    asym_gqa_decode,
    explain_backend,
    plan_decode,
)
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.call.keep import KeepCall
from gqa_kernels.native.schema import KEEP
from gqa_kernels.testing import assert_attention_close, assert_decode_close
from tests.cache.test_append import stored
from tests.cache.test_decode import USABLE, filled, queries
from tests.cases.appends import rotary_table
from tests.cases.attention import UNEVEN, interpreted
from tests.cases.caches import KINDS, Kind
from tests.cases.kept import random_kept

LENGTHS = [37, 0, 5]
PAGED = [
    Kind(page_size, order, format=format)
    for page_size, order, format in (
        (1, "HND", None), (3, "NHD", "int8"), (16, "HND", "int4"), (64, "NHD", "fp8_e4m3"),
        (16, "NHD", "k8v4"),
    )
]  # fmt: skip


def kept_rows(cache, kept, counts):
    """Keys and values of a cache at kept positions, by (sequence, head): ``[n, D]``."""
    k, v, _ = gather(cache.view())
    return {
        (b, h): tuple(x[b, h, kept[b, h, : counts[b, h]].to(x.device)] for x in (k, v))
        for b in range(kept.shape[0])
        for h in range(kept.shape[1])
    }


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", [*KINDS, *PAGED], ids=str)
def test_keeps_the_keys_of_each_head(kind, backend, device):
    dtype = torch.float32 if kind.format else torch.bfloat16
    cache, _ = filled(kind, dtype, device)
    kept, counts = random_kept(LENGTHS, UNEVEN.num_kv_heads, torch.Generator().manual_seed(11))
    expected = kept_rows(cache, kept, counts)
    cache.keep(kept.to(device), counts.to(device), backend=backend)
    assert torch.equal(cache.lengths.cpu().long(), counts)
    assert cache.next_positions.tolist() == LENGTHS
    k, v, _ = gather(cache.view())
    for (b, h), rows in expected.items():
        for x, rows_of_side in zip((k, v), rows, strict=True):
            assert torch.equal(x[b, h, : counts[b, h]], rows_of_side), (b, h)
    q = queries(3, UNEVEN, 1, 16, dtype, device)
    out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend=backend)
    assert_decode_close(out, q, cache, UNEVEN, lse=lse)


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "reference"])
@pytest.mark.parametrize("kind", [*KINDS, *PAGED], ids=str)
def test_moves_what_the_definition_moves(kind, backend, device):
    """Bit for bit, in used and unused slots."""
    kept, counts = random_kept(LENGTHS, UNEVEN.num_kv_heads, torch.Generator().manual_seed(12))
    memories = []
    for name in ("reference", backend):
        cache, _ = filled(kind, torch.float32, device)
        cache.keep(kept.to(device), counts.to(device), backend=name)
        memories.append(stored(cache))
    for x, y in zip(*memories, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", USABLE)
def test_other_numbers_of_value_heads_keep_the_same_keys(backend, device):
    cache, _ = filled(Kind(16, "NHD", format="int8"), torch.float32, device, value_heads=2)
    k, v, _ = gather(cache.view())
    kept = torch.tensor([[0, 3, 36], [0, 0, 0], [1, 2, 4]], device=device)
    counts = torch.tensor([3, 0, 2], device=device)
    cache.keep(kept, counts, backend=backend)
    assert cache.lengths.tolist() == [3, 0, 2]
    new_k, new_v, _ = gather(cache.view())
    for b, n in enumerate(counts.tolist()):
        for x, new in ((k, new_k), (v, new_v)):
            assert torch.equal(new[b, :, :n], x[b][:, kept[b, :n]])
    with pytest.raises(NotImplementedError, match=r"\[B, n\].*3 key heads and 2 value heads"):
        cache.keep(torch.zeros(3, 3, 0, dtype=torch.int32, device=device), backend=backend)


@pytest.mark.parametrize("shape", [(3, 37), (3, 3, 37), (3, 3, 20)])
def test_a_mask_is_the_same_as_its_positions(shape, device):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    lengths = torch.tensor(LENGTHS)
    mask &= torch.arange(shape[-1]) < lengths.view(3, *[1] * (len(shape) - 1))
    cache, _ = filled(Kind(3), torch.float32, device)
    k, v, _ = gather(cache.view())
    cache.keep(mask.to(device))
    assert cache.lengths.shape == shape[:-1]
    assert torch.equal(cache.lengths.cpu(), mask.sum(-1))
    new_k, new_v, _ = gather(cache.view())
    for b in range(3):
        for h in range(3):
            row = mask[b] if mask.dim() == 2 else mask[b, h]
            at = row.nonzero()[:, 0].to(device)
            assert torch.equal(new_k[b, h, : len(at)], k[b, h, at])
            assert torch.equal(new_v[b, h, : len(at)], v[b, h, at])


@pytest.mark.parametrize("backend", USABLE)
def test_pages_of_one_head_each(backend, device):
    """Sequences of the allocator are heads; what keep drops is free for other heads."""
    allocator, page_size = PageAllocator(24, 4), 4
    k, v = (torch.randn(24, page_size, 16, device=device) for _ in range(2))
    names = [allocator.allocate() for _ in range(6)]

    def cache_of(batch):
        found = PagedKVCache(
            k, v, batch.page_table.view(2, 3, -1).to(device), batch.lengths.view(2, 3).to(device)
        )
        if batch.next_positions is not None:
            found.next_positions = batch.next_positions.view(2, 3)[:, 0].to(device)
        return found

    new = torch.randn(2, 2, 3, 13, 16, device=device)
    cache_of(allocator.append(names, 13)).append(*new, backend=backend)
    assert allocator.num_free_pages == 0
    kept, counts = random_kept([13, 13], 3, torch.Generator().manual_seed(3))
    cache_of(allocator.keep(names, counts.flatten().tolist())).keep(
        kept.to(device), counts.to(device), backend=backend
    )
    held = sum(-(-n // page_size) for n in counts.flatten().tolist())
    assert allocator.num_free_pages == 24 - held
    more = torch.randn(2, 2, 3, 1, 16, device=device)
    batch = allocator.append(names, 1)
    cache = cache_of(batch)
    assert cache.next_positions.tolist() == [13, 13]
    cache.append(*more, backend=backend)
    head_map = HeadMap([0, 0, 1, 2, 2, 2])
    q = queries(2, head_map, 1, 16, torch.float32, device)
    out, lse = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
    most = int(counts.max()) + 1
    dense = torch.zeros(2, 2, 3, most, 16, device=device)
    for b in range(2):
        for h in range(3):
            n = int(counts[b, h])
            dense[:, b, h, :n] = new[:, b, h, kept[b, h, :n].to(device)]
            dense[:, b, h, n] = more[:, b, h, 0]
    lengths = (counts + 1).to(device)
    assert_attention_close(out, q, *dense, head_map, lse=lse, kv_lengths=lengths, causal=True)


def test_a_shared_prefix_is_copied_before_keys_move_in_it(device):
    allocator = PageAllocator(8, 4)
    pool = PagedKVCache.empty(8, 4, 1, 2, dtype=torch.float32, device=device)
    first = allocator.allocate()
    numbers = torch.arange(10.0, device=device).view(1, 1, 10, 1).repeat(1, 1, 1, 2)
    pool.at(allocator.append([first], 10)).append(numbers, numbers)
    second = allocator.fork(first)
    assert allocator.num_free_pages == 5
    batch = allocator.keep([second], 5)
    assert len(batch.copies) == 2  # the two pages that the five keys come to lie in
    cache = pool.at(batch)
    cache.keep(torch.tensor([[1, 3, 5, 7, 9]], device=device))
    assert allocator.num_free_pages == 3
    for name, expected in ((first, list(range(10))), (second, [1, 3, 5, 7, 9])):
        k, _, _ = gather(pool.at(allocator.batch([name])).view())
        assert k[0, 0, : allocator.length(name), 0].tolist() == expected
    allocator.free(first)
    allocator.free(second)
    assert allocator.num_free_pages == 8


def test_rotation_goes_on_from_the_positions_seen(device):
    """A cache that dropped keys rotates new ones as one that has them all."""
    cos, sin = (x.to(device) for x in rotary_table(16))
    rotary = {"rotary_cos": cos, "rotary_sin": sin}
    new = torch.randn(2, 2, 3, 12, 16, device=device)
    q = torch.randn(2, 6, 12, 16, device=device)
    whole, kept = (
        DenseKVCache.empty(2, 3, 16, 16, dtype=torch.float32, device=device) for _ in range(2)
    )
    for cache in (whole, kept):
        cache.append(*new[..., :8, :], q=q[..., :8, :], **rotary)
    mask = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(2)).to(device) < 0.5
    kept.keep(mask)
    rotated = [cache.append(*new[..., 8:, :], q=q[..., 8:, :], **rotary) for cache in (whole, kept)]
    torch.testing.assert_close(*rotated)
    assert kept.next_positions.tolist() == [12, 12]
    k, _, _ = gather(whole.view())
    found, _, _ = gather(kept.view())
    every = torch.nn.functional.pad(mask, (0, 4), value=True)
    for b in range(2):
        for h in range(3):
            n = int(every[b, h].sum())
            torch.testing.assert_close(found[b, h, :n], k[b, h, :12][every[b, h]])
    # Packed, and positions that the caller sets.
    offsets = torch.tensor([0, 1, 3], device=device)
    packed = torch.randn(2, 3, 3, 16, device=device)
    at = torch.tensor([3, 1, 0], device=device)
    turned = kept.append(
        *packed, q=packed[0], cu_seqlens=offsets, max_seqlen=2, rotary_positions=at, **rotary
    )
    alone = DenseKVCache.empty(3, 3, 16, 16, dtype=torch.float32, device=device)
    alone.lengths.copy_(at)
    by_length = alone.append(*packed[:, :, :, None], q=packed[0][:, :, None], **rotary)
    torch.testing.assert_close(turned, by_length[:, :, 0])


def test_windows_and_alibi_are_refused_over_kept_keys(device):
    cache, _ = filled(Kind(), torch.float32, device)
    q = queries(3, UNEVEN, 1, 16, torch.float32, device)
    slopes = torch.ones(6, device=device)
    plan = plan_decode(q, cache, UNEVEN, window=(4, None))
    cache.keep(torch.zeros(3, 1, dtype=torch.int64, device=device)[:, :0])
    for options in ({"window": (4, None)}, {"alibi_slopes": slopes}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(options))} must be None over a"):
            asym_gqa_decode(q, cache, UNEVEN, **options)
    with pytest.raises(NotImplementedError, match="window must be None over a"):
        plan(q, cache)
    assert not asym_gqa_decode(q, cache, UNEVEN).any()  # budgets of 0: no key to see


ERRORS = [
    (lambda c: c.keep([1]), TypeError, "kept must be a torch.Tensor, got list"),
    (lambda c: c.keep(torch.zeros(3, 2)), TypeError, "kept.dtype must be bool, int32 or int64"),
    (lambda c: c.keep(torch.zeros(2, 2).long()), ValueError, r"kept must have shape \(3, n\) or"),
    (lambda c: c.keep(torch.tensor([[37], [0], [0]]), torch.tensor([1, 0, 0])), ValueError,
     r"kept must lie in \[0, 37\), the length of sequence 0, head 0, got 37"),
    (lambda c: c.keep(torch.tensor([[0], [0], [0]])), ValueError, r"in \[0, 0\).*sequence 1"),
    (lambda c: c.keep(torch.tensor([[-1], [0], [0]]), torch.tensor([1, 0, 0])), ValueError,
     "got -1"),
    (lambda c: c.keep(torch.tensor([[3, 3], [0, 0], [0, 0]]), torch.tensor([2, 0, 0])), ValueError,
     "kept must ascend, each key once, got 3 after 3 at sequence 0, head 0"),
    (lambda c: c.keep(torch.tensor([[3, 2], [0, 0], [0, 0]]), torch.tensor([2, 0, 0])), ValueError,
     "got 2 after 3"),
    (lambda c: c.keep(torch.tensor([[0], [0], [0]]), torch.tensor([2, 0, 0])), ValueError,
     r"lengths must lie in \[0, 1\], the entries of kept in a row, got 2"),
    (lambda c: c.keep(torch.tensor([[0], [0], [0]]), torch.tensor([-1, 0, 0])), ValueError,
     r"lengths must lie in \[0, 1\].*got -1"),
    (lambda c: c.keep(torch.tensor([[0], [0], [0]]), torch.ones(3)), TypeError, "lengths.dtype"),
    (lambda c: c.keep(torch.zeros(3, 3, 1).long(), torch.tensor([0, 0, 0])), ValueError,
     r"lengths must have the shape \(3, 3\)"),
    (lambda c: c.keep(torch.ones(3, 40, dtype=torch.bool)), ValueError,
     r"kept must lie in \[0, 37\)"),
    (lambda c: c.keep(torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3).int()), ValueError,
     "lengths must be None where kept is a mask"),
    (lambda c: c.keep(torch.zeros(3, 0).long(), backend="none"), ValueError, "backend must be one"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_bad_input_is_an_error_and_moves_nothing(call, error, message):
    cache, _ = filled(Kind(16), torch.float32, "cpu", room=True)
    before = [x.clone() for x in stored(cache)]
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.next_positions is None and cache.lengths.tolist() == LENGTHS
    assert all(map(torch.equal, stored(cache), before))


def test_lengths_per_head_need_keys_per_head():
    cache, _ = filled(Kind(), torch.float32, "cpu")
    cache.lengths = torch.tensor([[3, 4, 5]] * 3)
    with pytest.raises(ValueError, match=r"kept must have shape \[B, Hk, n\] where each head"):
        cache.keep(torch.zeros(3, 1).long())


def test_wrong_positions_on_a_device_move_nothing(device):
    """The host doesn't see them there. Here they go to the backends past the checks."""
    for backend in USABLE:
        cache, _ = filled(Kind(3), torch.float32, device)
        call = cache_call(cache, [[-5, 2**31 - 1, 36], [0, 1, 2], [7, 1, 4]], [3, 3, 2**31 - 1])
        k, v, _ = gather(cache.view())
        assert BACKENDS[backend].prepare() is None
        BACKENDS[backend].keep(call)
        new_k, new_v, _ = gather(cache.view())
        k[0, :, 2], v[0, :, 2] = k[0, :, 36], v[0, :, 36]
        k[2, :, 2], v[2, :, 2] = k[2, :, 4], v[2, :, 4]
        assert torch.equal(new_k, k) and torch.equal(new_v, v)


@pytest.mark.parametrize("backend", USABLE)
def test_opcheck(backend, device):
    cache, _ = filled(Kind(4, format="int4", zeros=True), torch.float32, device)
    call = cache_call(cache, [[1, 5, 9], [0, 0, 0], [0, 3, 4]], [3, 0, 3])
    cache.keep(call.indices[..., :0], backend=backend)  # loads what has the op
    name = "cache_keep" if backend == "cpu" else f"{backend}_cache_keep"
    op = getattr(torch.ops.gqa_kernels, name).default
    torch.library.opcheck(op, KEEP.arguments_of(call))


def cache_call(cache, kept, counts):
    view, device = cache.view(), cache.k.device
    kept, counts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (kept, counts))
    heads = view.num_k_heads
    return KeepCall(view, kept[:, None].expand(-1, heads, -1), counts[:, None].expand(-1, heads))


def test_explains(device):
    cache, _ = filled(Kind(), torch.float32, device)
    reasons = explain_backend(cache.keep, torch.zeros(3, 0, dtype=torch.int32, device=device))
    assert reasons["reference"] == []
    assert not any("dtype" in reason or "keep" in reason for reason in reasons["cuda"])
    assert explain_backend(
        DenseKVCache.keep, cache, torch.zeros(3, 0, dtype=torch.int32, device=device)
    ) == reasons  # fmt: skip


@pytest.mark.parametrize("kind", [*PAGED, Kind(3, format="int4", zeros=True)], ids=str)
@pytest.mark.parametrize("backend", USABLE)
def test_histories_with_keep_equal_attention_over_the_kept_keys(kind, backend, device):
    """Appends, forks, keeps, crops and frees, against the rows that each sequence must have.

    Rows are compared as stored: what a format makes of a row is held elsewhere.
    """
    head_map, dim, heads = HeadMap([1, 0, 0, 2, 1]), 16, 3
    for seed in range(2 if interpreted(backend) else 12):
        generator = torch.Generator().manual_seed(seed)

        def pick(n, generator=generator):
            return int(torch.randint(0, n, (), generator=generator))

        allocator = PageAllocator(-(-600 // kind.page_size) + 40, kind.page_size)
        dtype = torch.float32 if kind.format else torch.bfloat16
        pool = PagedKVCache.empty(
            allocator.num_pages, kind.page_size, heads, dim, dtype=dtype, device=device,
            order=kind.order, format=kind.format, zeros=kind.zeros,
        )  # fmt: skip
        rows = {}  # name -> (k, v) [heads, n, dim] as attention reads them
        for _ in range(14):
            action, names = pick(6), list(rows)
            name = names[pick(len(names))] if names else None
            if name is None or action == 0:
                name = allocator.allocate()
                rows[name] = tuple(torch.zeros(heads, 0, dim, device=device) for _ in range(2))
                action = 5
            if action == 1:
                length = pick(allocator.length(name) + 1)
                child = allocator.fork(name, length)
                rows[child] = tuple(x[:, :length] for x in rows[name])
            elif action == 2:
                n = allocator.length(name)
                count = pick(n + 1)
                kept = torch.randperm(n, generator=generator)[:count].sort().values
                cache = pool.at(allocator.keep([name], count))
                cache.keep(kept[None].to(device), backend=backend)
                rows[name] = tuple(x[:, kept.to(device)] for x in rows[name])
            elif action == 3:
                length = pick(allocator.length(name) + 1)
                allocator.truncate(name, length)
                rows[name] = tuple(x[:, :length] for x in rows[name])
            elif action == 4 and len(rows) > 2:
                allocator.free(name)
                del rows[name]
            elif action == 5:
                count = 1 + pick(9)
                cache = pool.at(allocator.append([name], count))
                new = torch.randn(2, 1, heads, count, dim, generator=generator).to(device, dtype)
                cache.append(*new, backend=backend)
                view = cache.view()
                found = [x[0, :, view.kv_lengths[0, 0] - count : view.kv_lengths[0, 0]]
                         for x in gather(view)[:2]]  # fmt: skip
                rows[name] = tuple(
                    torch.cat([x, y.float()], 1) for x, y in zip(rows[name], found, strict=True)
                )
        cache = pool.at(allocator.batch(list(rows)))
        k, v, _ = gather(cache.view())
        for b, expected in enumerate(rows.values()):
            for x, y in zip((k, v), expected, strict=True):
                assert torch.equal(x[b, :, : y.shape[1]].float(), y)
        q = queries(len(rows), head_map, 1, dim, dtype, device, seed)
        out, lse = asym_gqa_decode(q, cache, head_map, return_lse=True, backend=backend)
        assert_decode_close(out, q, cache, head_map, lse=lse)
        for name in list(rows):
            allocator.free(name)
        assert allocator.num_free_pages == allocator.num_pages
