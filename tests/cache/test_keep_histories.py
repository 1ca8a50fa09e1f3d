"""Histories of appends, keeps and crops in every kind of cache, each head on its own."""

import pytest
import torch

from gqa_kernels import asym_gqa_decode
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.testing import assert_attention_close, assert_decode_close
from tests.cache.test_decode import USABLE, queries
from tests.cases.attention import UNEVEN, interpreted
from tests.cases.caches import KINDS, Kind, empty_cache

HEADS, DIM, CAPACITY = UNEVEN.num_kv_heads, 16, 60
SIZES = [
    Kind(page_size, "NHD", format=format)
    for page_size in (1, 3, 16, 64)
    for format in ("fp8_e4m3", "int8", "int4", "k8v4")
]


def kept_positions(lengths, generator, how):
    """A mask, or ascending positions with garbage behind, of a part of each head's keys."""
    mask = torch.rand(*lengths.shape, int(lengths.max()), generator=generator) < 0.7
    mask &= torch.arange(mask.shape[2]) < lengths[..., None]
    mask[torch.rand(lengths.shape, generator=generator) < 0.1] = False  # budgets of 0
    if how == "mask":
        return mask, (mask,)
    counts = mask.sum(-1)
    positions = torch.full((*lengths.shape, int(counts.max()) + 2), 123456)
    for b in range(lengths.shape[0]):
        for h in range(lengths.shape[1]):
            positions[b, h, : counts[b, h]] = mask[b, h].nonzero()[:, 0]
    return mask, (positions, counts)


@pytest.mark.parametrize("kind", [*KINDS, *SIZES], ids=str)
@pytest.mark.parametrize("backend", USABLE)
def test_each_head_on_its_own(kind, backend, device):
    """Attention equals dense attention over the rows that each head must still have.

    Rows of a quantised cache are taken as they were stored: what a format makes of a row is held
    elsewhere.
    """
    dtype = torch.float32 if kind.format else torch.bfloat16
    done = set()
    for seed in range(2 if interpreted(backend) else 4):
        generator = torch.Generator().manual_seed(seed)
        cache = empty_cache(kind, 3, CAPACITY, UNEVEN, DIM, DIM, dtype, device, generator)
        none = torch.zeros(0, DIM)
        rows = {(b, h): (none, none) for b in range(3) for h in range(HEADS)}
        for step in range(10):
            lengths = cache.lengths.cpu().long()
            lengths = lengths[:, None].expand(-1, HEADS) if lengths.dim() == 1 else lengths
            assert lengths.tolist() == [
                [len(rows[b, h][0]) for h in range(HEADS)] for b in range(3)
            ]
            count = int(torch.randint(1, 9, (), generator=generator))
            action = int(torch.randint(0, 3, (), generator=generator)) if step % 2 else 0
            if action == 0 and int(lengths.max()) + count <= CAPACITY:
                new = torch.randn(2, 3, HEADS, count, DIM, generator=generator).to(dtype)
                cache.append(*new.to(device), backend=backend)
                stored = [x.cpu().float() for x in gather(cache.view())[:2]]
                for (b, h), old in rows.items():
                    at = slice(int(lengths[b, h]), int(lengths[b, h]) + count)
                    fresh = [x[b, h, at] for x in stored]
                    if kind.format is None:
                        assert all(map(torch.equal, fresh, new[:, b, h].float()))
                    rows[b, h] = tuple(map(torch.cat, zip(old, fresh, strict=True)))
            elif action == 1:  # crop
                shorter = (lengths * torch.rand(lengths.shape, generator=generator)).long()
                shorter = torch.where(torch.rand(lengths.shape, generator=generator) < 0.5, shorter,
                                      lengths)  # fmt: skip
                cache.lengths = shorter.to(device, torch.int32)
                rows = {(b, h): tuple(x[: shorter[b, h]] for x in old)
                        for (b, h), old in rows.items()}  # fmt: skip
            else:
                how = "mask" if step % 4 == 1 else "positions"
                mask, given = kept_positions(lengths, generator, how)
                cache.keep(*(x.to(device) for x in given), backend=backend)
                rows = {(b, h): tuple(x[mask[b, h, : len(x)]] for x in old)
                        for (b, h), old in rows.items()}  # fmt: skip
                action = 2
            done.add(action)
            stored = [x.cpu().float() for x in gather(cache.view())[:2]]
            for (b, h), old in rows.items():
                for x, y in zip(stored, old, strict=True):
                    assert torch.equal(x[b, h, : len(y)], y), (step, b, h)
        q = queries(3, UNEVEN, 1, DIM, dtype, device, seed)
        out, lse = asym_gqa_decode(q, cache, UNEVEN, return_lse=True, backend=backend)
        assert_decode_close(out, q, cache, UNEVEN, lse=lse)
        counts = torch.tensor([[len(rows[b, h][0]) for h in range(HEADS)] for b in range(3)])
        dense = torch.zeros(2, 3, HEADS, max(1, int(counts.max())), DIM)
        for (b, h), old in rows.items():
            for side in range(2):
                dense[side, b, h, : len(old[side])] = old[side]
        assert_attention_close(
            out, q, *dense.to(device, dtype), UNEVEN, lse=lse, kv_lengths=counts.to(device)
        )
    assert done == {0, 1, 2}
