"""``batch_invariant=True``: a query's bits depend on its own keys alone.

Each sequence of a random batch is run alone, and then in other surroundings: with other sequences,
in another order, in chunks, by other threads, in dense, paged or packed memory. No bit may change.
"""

from __future__ import annotations

import random

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    explain_backend,
)
from gqa_kernels.backends.dispatch import BACKENDS
from tests.api.test_attention import USABLE

INVARIANT = [name for name in USABLE if "batch_invariant" in BACKENDS[name].capabilities.options]
FORMATS = (None, None, "fp8_e4m3", "int8", "int4")
# Random calls of a backend: of the CPU tests, and of the slow ones.
CALLS, SLOW_CALLS = {"cpu": 60, "reference": 12}, {"cpu": 600, "reference": 60}


def cut(out: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    """Packed ``[Hq, total, Dv]``, by sequence."""
    return list(out.tensor_split(offsets[1:-1].long(), 1))


class Surroundings:
    """A random batch of sequences with queries at their ends, and ways to run them."""

    def __init__(self, seed: int, backend: str):
        rnd = self.rnd = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        small = backend == "reference"
        self.backend = backend
        self.dtype = rnd.choice([torch.float32, torch.bfloat16, torch.float16])
        heads, kv_heads = rnd.randint(1, 7), rnd.randint(1, 3)
        self.head_map = HeadMap([rnd.randrange(kv_heads) for _ in range(heads)], kv_heads)
        dim = rnd.choice([8, 16, 40] if small else [8, 16, 64, 80, 128, 300])
        self.value_dim = rnd.choice([dim, 24])
        batch, longest = rnd.randint(2, 4), rnd.choice([40, 70] if small else [70, 300, 2300])
        self.lengths = [rnd.randint(1, longest) for _ in range(batch)]
        self.counts = [rnd.randint(1, min(n, rnd.choice([1, 7, 60]))) for n in self.lengths]

        def rows(n, heads, dim):
            return torch.randn(heads, n, dim, generator=generator).to(self.dtype)

        self.k = [rows(n, kv_heads, dim) for n in self.lengths]
        self.v = [rows(n, kv_heads, self.value_dim) for n in self.lengths]
        self.q = [rows(n, heads, dim) for n in self.counts]
        slopes = torch.rand(heads, generator=generator) / 8
        self.options = {
            "causal": True,
            "window": rnd.choice([None, None, (rnd.randint(0, 50), None)]),
            "softcap": rnd.choice([None, None, 3.0]),
            "sinks": torch.randn(heads, generator=generator) if rnd.random() < 0.3 else None,
            "alibi_slopes": slopes if rnd.random() < 0.3 else None,
            "batch_invariant": True,
            "backend": backend,
        }

    def alone(self, b: int) -> torch.Tensor:
        """Sequence ``b`` by itself, as dense tensors: out ``[Hq, n, Dv]``."""
        q, k, v = (x[b][None] for x in (self.q, self.k, self.v))
        return asym_gqa_attention(q, k, v, self.head_map, **self.options)[0]

    def cache(self, order: list[int], paged: bool, format: str | None):
        """A cache of these sequences, in this order."""
        lengths = [self.lengths[b] for b in order]
        sizes = {"value_head_dim": self.value_dim, "dtype": self.dtype, "format": format}
        shape = (self.head_map.num_kv_heads, self.k[0].shape[2])
        if paged:
            page_size = self.rnd.choice([3, 16, 64])
            pages = [-(-n // page_size) for n in lengths]
            pool = PagedKVCache.empty(sum(pages) + 2, page_size, *shape, **sizes)
            table = torch.zeros(len(order), max(pages), dtype=torch.int32)
            free = self.rnd.sample(range(sum(pages)), sum(pages))
            for row, count in enumerate(pages):
                table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
            cache = pool.at(table, torch.zeros(len(order), dtype=torch.int32))
        else:
            room = max(lengths) + self.rnd.randint(0, 9)
            cache = DenseKVCache.empty(len(order), shape[0], room, shape[1], **sizes)
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)]).int()
        k, v = (torch.cat([x[b] for b in order], 1).transpose(0, 1) for x in (self.k, self.v))
        cache.append(k, v, cu_seqlens=offsets)
        return cache

    def over(self, cache, order: list[int], first: int = 0) -> list[torch.Tensor]:
        """Queries from number ``first`` on, packed, over a cache; one out per sequence."""
        q = [self.q[b][:, first:] for b in order]
        offsets = torch.tensor([0, *torch.tensor([x.shape[1] for x in q]).cumsum(0)]).int()
        packed = torch.cat(q, 1).transpose(0, 1).contiguous()
        out = asym_gqa_decode(
            packed, cache, self.head_map, cu_seqlens_q=offsets, **self.options
        ).transpose(0, 1)
        return cut(out, offsets)

    def packed(self, order: list[int]) -> list[torch.Tensor]:
        """As packed sequences."""
        offsets = [
            torch.tensor([0, *torch.tensor([x[b].shape[1] for b in order]).cumsum(0)]).int()
            for x in (self.q, self.k)
        ]
        q, k, v = (
            torch.cat([x[b] for b in order], 1).transpose(0, 1) for x in (self.q, self.k, self.v)
        )
        out = asym_gqa_varlen_attention(
            q, k, v, self.head_map, *offsets, max(self.counts), max(self.lengths), **self.options
        ).transpose(0, 1)
        return cut(out, offsets[0])

    def in_chunks(self, b: int) -> torch.Tensor:
        """Sequence ``b`` alone, its queries in chunks of any size, each with the keys so far."""
        cuts = sorted(self.rnd.sample(range(1, self.counts[b]), min(2, self.counts[b] - 1)))
        before = self.lengths[b] - self.counts[b]
        outs = []
        for first, stop in zip([0, *cuts], [*cuts, self.counts[b]], strict=True):
            q = self.q[b][None, :, first:stop]
            k, v = (x[b][None, :, : before + stop] for x in (self.k, self.v))
            outs.append(asym_gqa_attention(q, k, v, self.head_map, **self.options)[0])
        return torch.cat(outs, 1)

    def check(self) -> None:
        rnd, batch = self.rnd, len(self.lengths)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(rnd.randint(1, 4))
            expected = [self.alone(b) for b in range(batch)]
            torch.set_num_threads(rnd.randint(1, 4))
            for b in range(batch):
                assert torch.equal(self.in_chunks(b), expected[b]), "in chunks"
            order = rnd.sample(range(batch), rnd.randint(1, batch))
            for b, out in zip(order, self.packed(order), strict=True):
                assert torch.equal(out, expected[b]), "packed"
            self.check_caches(None, expected)
            if format := rnd.choice(FORMATS):
                if format == "int4" and (self.k[0].shape[2] % 2 or self.value_dim % 2):
                    return
                self.check_caches(format, None)
        finally:
            torch.set_num_threads(threads)

    def check_caches(self, format: str | None, expected: list[torch.Tensor] | None) -> None:
        rnd, everyone = self.rnd, list(range(len(self.lengths)))
        if expected is None:
            expected = [self.over(self.cache([b], False, format), [b])[0] for b in everyone]
        for paged in (False, True):
            torch.set_num_threads(rnd.randint(1, 4))
            order = rnd.sample(everyone, rnd.randint(1, len(everyone)))
            found = self.over(self.cache(order, paged, format), order)
            for b, out in zip(order, found, strict=True):
                assert torch.equal(out, expected[b]), f"over a cache, paged {paged}, {format}"


def run(backend: str, seeds: range) -> None:
    for seed in seeds:
        try:
            Surroundings(seed, backend).check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("backend", INVARIANT)
def test_bits_depend_on_a_querys_own_keys_alone(backend):
    run(backend, range(CALLS[backend]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", INVARIANT)
def test_many_more_of_them(backend):
    run(backend, range(1000, 1000 + SLOW_CALLS[backend]))


@pytest.mark.parametrize("backend", INVARIANT)
def test_a_decode_step_has_the_bits_of_a_prefill(backend):
    """One token at a time over a growing cache, as a prompt in one piece."""
    head_map = HeadMap([0, 1, 1, 1, 0])
    q, k, v = (torch.randn(1, heads, 37, 24) for heads in (5, 2, 2))
    whole = asym_gqa_attention(
        q, k, v, head_map, causal=True, batch_invariant=True, backend=backend
    )
    cache = DenseKVCache.empty(1, 2, 40, 24, dtype=torch.float32)
    for i in range(37):
        token = slice(i, i + 1)
        out = asym_gqa_decode(
            q[:, :, token], cache, head_map, k_new=k[:, :, token], v_new=v[:, :, token],
            batch_invariant=True, backend=backend,
        )  # fmt: skip
        assert torch.equal(out, whole[:, :, token])


def test_without_it_bits_do_differ():
    """Otherwise the tests above would show nothing."""
    if "cpu" not in INVARIANT:
        pytest.skip("the CPU backend is not usable")
    head_map = HeadMap([0] * 40)
    q, k, v = (torch.randn(1, heads, 600, 64) for heads in (40, 1, 1))
    for invariant in (False, True):
        options = {"batch_invariant": invariant, "causal": True, "backend": "cpu"}
        whole = asym_gqa_attention(q, k, v, head_map, **options)
        last = asym_gqa_attention(q[:, :1, -1:], k, v, [0], **options)
        assert torch.equal(whole[:, :1, -1:], last) == invariant


def test_others_refuse_it():
    q, k, v = (torch.randn(1, heads, 3, 8) for heads in (2, 1, 1))
    reasons = explain_backend(asym_gqa_attention, q, k, v, [0, 0], batch_invariant=True)
    for name, backend in BACKENDS.items():
        refused = "option batch_invariant is not supported" in reasons[name]
        assert refused != ("batch_invariant" in backend.capabilities.options)


def test_not_with_dropout():
    q, k, v = (torch.randn(1, heads, 3, 8) for heads in (2, 1, 1))
    with pytest.raises(ValueError, match=r"dropout_p must be 0\.0 with batch_invariant"):
        asym_gqa_attention(q, k, v, [0, 0], dropout_p=0.5, batch_invariant=True)
