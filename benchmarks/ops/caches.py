"""Decode over KV caches and appends to them: problems, gates and contestants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gqa_kernels import DenseKVCache, PagedKVCache, asym_gqa_decode, explain_backend, plan_decode
from gqa_kernels.backends.dispatch import BACKENDS, explain, select
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.cache.base import KVCache
from gqa_kernels.call.append import AppendCall
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.decode import decode_call
from gqa_kernels.testing import assert_cache_close

from ..data.cases import Case
from ..peers.base import BackendContestant, Contestant, Prepared
from .attention import num_copies


@dataclass(frozen=True)
class CacheProblem:
    """Tensors of a case over a cache.

    Attributes:
        copies: queries ``[B, Hq, Sq, D]`` and a full cache of the case's kind, other values each.
        dense: the tokens of each copy in a dense cache of the queries' type; for budgets of heads,
            as many tokens, spread evenly over the heads.
    """

    case: Case
    copies: list[tuple[Tensor, KVCache]]
    dense: list[KVCache]

    @classmethod
    def build(cls, case: Case, device: torch.device) -> CacheProblem:
        copies, dense = [], []
        for seed in range(num_copies(case, device)):
            q, plain, cache = _tensors(case, device, seed)
            copies.append((q, cache))
            dense.append(plain)
        return cls(case, copies, dense)

    @property
    def tensors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k, v of every copy, before they are stored."""
        caches = zip(self.copies, self.dense, strict=True)
        return [(q, dense.k, dense.v) for (q, _), dense in caches]

    def over(self, k: Tensor, v: Tensor) -> CacheProblem:
        """The first copy's queries over other values ``[B, Hkv, Sk, D]``."""
        q, cache = self.copies[0]
        return CacheProblem(self.case, [(q, DenseKVCache(k, v, cache.lengths))], [])


def _tensors(case: Case, device: torch.device, seed: int) -> tuple[Tensor, KVCache, KVCache]:
    """Queries, a dense cache of normal random tokens, and the same tokens in the case's cache."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, dim, dtype = case.head_map.num_kv_heads, case.head_dim, case.torch_dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    q = normal(case.batch, case.head_map.num_heads, case.q_len, dim)
    k, v = (normal(case.batch, heads, case.kv_len, dim) for _ in range(2))
    lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device)
    plain = DenseKVCache(k, v, lengths)
    kind = case.cache_kind
    memory = {"dtype": dtype, "device": device, "format": kind.format}
    empty = torch.zeros_like(lengths)
    if kind.budgets:
        return q, plain, _with_budgets(case, normal, generator)
    if kind.page_size:
        max_pages = -(-case.kv_len // kind.page_size)
        pages = torch.randperm(case.batch * max_pages, generator=generator, device=device)
        table = pages.view(case.batch, max_pages).to(torch.int32)
        pool = PagedKVCache.empty(len(pages), kind.page_size, heads, dim, **memory)
        cache = pool.at(table, empty)
    else:
        cache = DenseKVCache.empty(case.batch, heads, case.kv_len, dim, **memory)
    cache.append(k, v)
    return q, plain, cache


def budgets(case: Case) -> list[int]:
    """Keys of each head: from half to one and a half of ``kv_len``, which is their mean."""
    heads = case.head_map.num_kv_heads
    first = [round(case.kv_len * (0.5 + h / max(heads - 1, 1))) for h in range(heads // 2)]
    return first + [case.kv_len] * (heads % 2) + [2 * case.kv_len - n for n in reversed(first)]


def _with_budgets(case: Case, normal: Callable[..., Tensor], generator) -> PagedKVCache:
    """A cache full of normal random tokens whose heads have lengths of their own; pages of one
    head each, none to spare."""
    device, size = generator.device, case.cache_kind.page_size
    counts = torch.tensor(budgets(case), device=device)
    pages = (counts + size - 1) // size
    order = torch.randperm(case.batch * int(pages.sum()), generator=generator, device=device)
    table = order.new_zeros(case.batch, len(counts), int(pages.max()), dtype=torch.int32)
    used = torch.arange(table.shape[2], device=device) < pages[:, None]
    table[used.expand_as(table)] = order.to(torch.int32)
    k, v = (normal(len(order), size, case.head_dim) for _ in range(2))
    lengths = counts.to(torch.int32).repeat(case.batch, 1)
    return PagedKVCache(k, v, table, lengths)


class CacheGate:
    """Holds decode results of the first copy's first and last sequence to the tolerance rule, over
    the values that the cache represents."""

    def __init__(self, problem: CacheProblem):
        q, cache = problem.copies[0]
        self.inputs = decode_call(q, cache, problem.case.head_map, **problem.case.options)

    def check(self, out: Tensor) -> None:
        assert out.shape == self.inputs.q.shape, f"out: shape {tuple(out.shape)}"
        for b in {0, self.inputs.kv.batch - 1}:
            assert_cache_close(out[b : b + 1], _sequence(self.inputs, b))


def _sequence(inputs: AttentionCall, b: int) -> AttentionCall:
    """The call of one sequence."""
    view, one = inputs.kv, slice(b, b + 1)
    changes = {"kv_lengths": view.kv_lengths[one]}
    if view.page_table is not None:
        changes["page_table"] = view.page_table[one]
    else:
        names = ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")
        changes |= {n: getattr(view, n)[one] for n in names if getattr(view, n) is not None}
    return inputs.replace(q=inputs.q[one], kv=replace(view, **changes))


class CacheContestant(BackendContestant):
    """A backend over the case's cache, through a plan made before the timing."""

    def __init__(self, name: str):
        super().__init__(name)
        self.summary = f"plan_decode(..., backend={name!r}), one call a layer"

    def unsupported_reason(self, problem: CacheProblem) -> str | None:
        q, cache = problem.copies[0]
        reasons = explain_backend(
            asym_gqa_decode, q, cache, problem.case.head_map, **problem.case.options
        )
        return "; ".join(reasons[self.backend]) or None

    def prepare(self, problem: CacheProblem) -> Prepared:
        return Prepared(self._runs(problem, problem.copies))

    def _runs(
        self, problem: CacheProblem, copies: list[tuple[Tensor, KVCache]]
    ) -> Callable[[int], Tensor]:
        case = problem.case
        plans = [
            plan_decode(*copy, case.head_map, backend=self.backend, **case.options)
            for copy in copies
        ]
        return lambda i: plans[i](*copies[i])

    def control(self) -> Contestant:
        return DenseControl(self.backend)


class DenseControl(CacheContestant):
    """The same tokens in a dense cache of the queries' type: what pages cost, and formats save."""

    kind = "control"

    def __init__(self, backend: str):
        super().__init__(backend)
        self.name = f"{backend}, dense cache"
        self.summary += ", over a dense cache of the queries' type"

    def prepare(self, problem: CacheProblem) -> Prepared:
        dense = [(q, d) for (q, _), d in zip(problem.copies, problem.dense, strict=True)]
        q, cache = problem.copies[0]
        return Prepared(
            self._runs(problem, dense),  # the gate knows the result over the case's cache only
            lambda _: asym_gqa_decode(
                q, cache, problem.case.head_map, backend=self.backend, **problem.case.options
            ),
        )

    def control(self) -> None:
        return None


class AppendGate:
    """Compares what is stored, new tokens included, with what the reference stores. Before each
    append others stand in the new tokens' slots."""

    def __init__(self, problem: CacheProblem):
        self.room = _shortened(problem.copies[0][1], problem.case)
        self.new = _new_tokens(problem)
        self.room.append(self.new, self.new, advance=False, backend="reference")
        self.expected = gather(problem.copies[0][1].view())[:2]
        self._append_others()

    def check(self, cache: KVCache) -> None:
        for name, got, expected in zip("kv", gather(cache.view())[:2], self.expected, strict=True):
            assert torch.equal(got, expected), f"{name}: other values than the reference stores"
        self._append_others()

    def _append_others(self) -> None:
        others = self.new.flip(-1)
        self.room.append(others, others, advance=False, backend="reference")


class AppendContestant(CacheContestant):
    """A backend's append of the last tokens, over and over to the same slots."""

    def __init__(self, name: str):
        super().__init__(name)
        self.summary = f"cache.append(..., backend={name!r}), checked before the timing"

    def unsupported_reason(self, problem: CacheProblem) -> str | None:
        return "; ".join(explain(self._calls(problem)[0])[self.backend]) or None

    def prepare(self, problem: CacheProblem) -> Prepared:
        calls = self._calls(problem)
        backend = select(calls[0], self.backend)
        return Prepared(lambda i: backend.append(calls[i]), lambda _: problem.copies[0][1])

    def control(self) -> None:
        return None

    @staticmethod
    def _calls(problem: CacheProblem) -> list[AppendCall]:
        new = _new_tokens(problem)
        caches = [_shortened(cache, problem.case) for _, cache in problem.copies]
        return [AppendCall.create(new, new, cache.view()) for cache in caches]


class IndexPutPeer(Contestant):
    """What a model without a kernel does: torch's own scatter, once for K and once for V."""

    name = "index_put"
    summary = "k.index_put_ and v.index_put_ of the new tokens; their pages and slots are not timed"

    def unsupported_reason(self, problem: CacheProblem) -> str | None:
        kind = problem.case.cache_kind
        if kind.format:
            return "the cache is quantised"
        return "the heads have pages of their own" if kind.budgets else None

    def prepare(self, problem: CacheProblem) -> Prepared:
        # [B, S, H, D], and where each token goes: [B, S] pages (or sequences) and slots.
        new = _new_tokens(problem).transpose(1, 2).contiguous()
        case, views, places = problem.case, [], []
        for _, cache in problem.copies:
            view = cache.view()
            slot = torch.arange(case.kv_len - case.q_len, case.kv_len, device=new.device)
            page = torch.arange(case.batch, device=new.device)[:, None].expand(-1, case.q_len)
            if view.page_table is not None:
                page = view.page_table[:, 0, slot // view.page_size].long()
            views.append([x.transpose(1, 2) for x in (view.k, view.v)])  # [P, page_size, H, D]
            places.append((page, (slot % view.page_size).expand_as(page)))

        def run(i: int) -> None:
            for x in views[i]:
                x.index_put_(places[i], new)

        return Prepared(run, lambda _: problem.copies[0][1])


def _shortened(cache: KVCache, case: Case) -> KVCache:
    """The cache without the tokens that are to be appended."""
    lengths = cache.lengths - case.q_len
    if isinstance(cache, PagedKVCache):
        return cache.at(cache.page_table, lengths)
    return DenseKVCache(cache.k, cache.v, lengths, **cache.scales)


def _new_tokens(problem: CacheProblem) -> Tensor:
    """Tokens to append, ``[B, Hkv, S, D]``, as keys and as values."""
    case, device = problem.case, problem.copies[0][0].device
    shape = (case.batch, case.head_map.num_kv_heads, case.q_len, case.head_dim)
    new = torch.linspace(-2, 2, case.head_dim, dtype=case.torch_dtype, device=device)
    return new.repeat(*shape[:3], 1)


def cache_backends() -> dict[str, Contestant]:
    """Every backend over caches, by name."""
    return {name: CacheContestant(name) for name in BACKENDS}


def append_backends() -> dict[str, Contestant]:
    """Every backend's append, by name."""
    return {name: AppendContestant(name) for name in BACKENDS}


def append_peers() -> dict[str, Contestant]:
    """What appends are compared with, by name."""
    return {IndexPutPeer.name: IndexPutPeer()}
