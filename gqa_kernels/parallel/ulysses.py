"""Ulysses attention: ranks exchange tokens for heads, attend, and exchange back.

Every rank holds some tokens of all heads. An all-to-all exchanges them for all tokens of some
heads, ordinary attention runs on these, and a second all-to-all returns the outputs (DeepSpeed
Ulysses, arXiv 2309.14509). :meth:`gqa_kernels.HeadMap.shard` assigns the heads to ranks, so the
counts need not divide by the number of ranks. K and V are never expanded: a rank receives the KV
heads that its query heads read, with a map of its own.

With a second group the exchange runs inside a ring of :mod:`.context` (USP, arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import asym_gqa_attention
from ..cache.tensors import Layout, check_layout
from ..head_map import HeadMap
from ..native.arguments import check_tensors
from .context import context_parallel_attention
from .ring import Ranges, Ring


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: HeadMap | Sequence[int],
    *,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    value_head_map: HeadMap | Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    deterministic: bool = False,
    group: dist.ProcessGroup | None = None,
    ring_group: dist.ProcessGroup | None = None,
    q_ranges: Ranges | None = None,
    kv_ranges: Ranges | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gqa_kernels.asym_gqa_attention` over tokens that lie on the ranks of a group.

    Every rank of the group calls it with its own q, k and v and otherwise the same arguments. If
    one rank's q, k or v requires a gradient, all ranks' must, and all must run backward. The
    gradient of ``sinks`` covers this rank's heads only: sum it over the group, as you do with the
    gradient of any parameter.

    Args:
        q: ``[B, Hq, Sq, D]``, this rank's queries; k and v ``[B, Hkv, Sk, D or Dv]`` its keys. Any
            number of tokens. Rank r's tokens follow rank r-1's.
        q_lengths, kv_lengths: queries and keys of every rank. By default the ranks exchange them
            first, and wait for them.
        group: process group of the exchange; default the world. Each of its ranks gets at least one
            query head.
        ring_group: the ranks that hold the same heads of other tokens. They form the ring of
            :func:`gqa_kernels.parallel.context.context_parallel_attention`, and the tokens of this
            rank's ``group`` together act as one rank's tokens there.
        q_ranges, kv_ranges: positions of the tokens of every rank of ``ring_group``, in the form of
            that function. By default one group follows another.
        others: as for ``asym_gqa_attention``.

    Returns:
        as ``asym_gqa_attention``, for this rank's queries.

    Raises:
        ValueError, TypeError: as ``asym_gqa_attention``; or the group has more ranks than query
            heads; or lengths don't fit; or ranges are passed without a ring.

    Examples:
        >>> # 28 query heads over 4 KV heads on 8 ranks: 4 or 3 query heads each
        >>> out = ulysses_attention(q, k, v, HeadMap.uniform(28, 4), causal=True)
    """
    check_tensors(q=q, k=k, v=v)
    check_layout(layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {x.dim()} {tuple(x.shape)}")
    if ring_group is None and not (q_ranges is None and kv_ranges is None):
        raise ValueError("q_ranges and kv_ranges must come with a ring_group, got them alone")
    ranks = Ring.of(group)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    head_map = _as_map(head_map, k)
    value_map = None if value_head_map is None else _as_map(value_head_map, v)
    shards = [
        head_map.shard(rank, ranks.world, value_head_map=value_map) for rank in range(ranks.world)
    ]
    mine = shards[ranks.rank]
    q_lengths, kv_lengths = _lengths(ranks, q_lengths, kv_lengths, q.shape[2], k.shape[2])
    queries = Exchange(ranks, [s.query_heads for s in shards], q_lengths, head_map.num_heads)
    keys = Exchange(ranks, [s.kv_heads for s in shards], kv_lengths, k.shape[1])
    values = Exchange(ranks, [s.value_heads for s in shards], kv_lengths, v.shape[1])
    heads = list(mine.query_heads)
    options = {
        "value_head_map": mine.value_head_map, "causal": causal, "scale": scale, "window": window,
        "softcap": softcap, "deterministic": deterministic, "backend": backend, "return_lse": True,
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes[..., heads],
        "sinks": None if sinks is None else sinks[heads],
    }  # fmt: skip
    tensors = [ToHeads.apply(x, exchange) for x, exchange in ((q, queries), (k, keys), (v, values))]
    if ring_group is None:
        out, lse = asym_gqa_attention(*tensors, mine.head_map, **options)
    else:
        out, lse = context_parallel_attention(
            *tensors, mine.head_map, q_ranges=q_ranges, kv_ranges=kv_ranges, group=ring_group,
            **options,
        )  # fmt: skip
    out = ToTokens.apply(out, queries)
    out = out.transpose(1, 2) if layout == "bshd" else out
    if not return_lse:
        return out
    return out, ToTokens.apply(lse[..., None], queries)[..., 0]


@dataclass(frozen=True)
class Exchange:
    """The ranks' heads and tokens of one tensor.

    Attributes:
        ranks: the ranks of the group.
        heads: each rank's heads after the exchange. Ranks may have heads in common.
        tokens: each rank's number of tokens before the exchange.
        num_heads: number of heads before the exchange.
    """

    ranks: Ring
    heads: Sequence[Sequence[int]]
    tokens: Sequence[int]
    num_heads: int

    def to_heads(self, x: Tensor) -> Tensor:
        """Exchange ``[B, H, own tokens, D]`` for ``[B, own heads, tokens, D]``."""
        batch, dim = x.shape[0], x.shape[3]
        sent = [x[:, list(heads)].flatten() for heads in self.heads]
        mine = len(self.heads[self.ranks.rank])
        received = self._swap(sent, [batch * mine * tokens * dim for tokens in self.tokens])
        shapes = [(batch, mine, tokens, dim) for tokens in self.tokens]
        return torch.cat([x.view(s) for x, s in zip(received, shapes, strict=True)], dim=2)

    def to_tokens(self, y: Tensor) -> Tensor:
        """Exchange ``[B, own heads, tokens, D]`` for ``[B, H, own tokens, D]``.

        Sums over the ranks that have a head, and returns zeros for heads that no rank has.
        """
        batch, dim = y.shape[0], y.shape[3]
        own = self.tokens[self.ranks.rank]
        sent = [part.flatten() for part in y.split(list(self.tokens), dim=2)]
        received = self._swap(sent, [batch * len(heads) * own * dim for heads in self.heads])
        precise = torch.promote_types(y.dtype, torch.float32)
        x = torch.zeros(batch, self.num_heads, own, dim, dtype=precise, device=y.device)
        for heads, part in zip(self.heads, received, strict=True):
            index = torch.tensor(heads, device=y.device)
            x.index_add_(1, index, part.view(batch, len(heads), own, dim).to(precise))
        return x.to(y.dtype)

    def _swap(self, sent: list[Tensor], sizes: list[int]) -> tuple[Tensor, ...]:
        """Send one buffer to each rank, and receive one of the given size from each."""
        buffer = torch.cat(sent)
        received = buffer.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, buffer, sizes, [x.numel() for x in sent], group=self.ranks.group
        )
        return received.split(sizes)


class ToHeads(torch.autograd.Function):
    """:meth:`Exchange.to_heads`. A head's gradient is the sum over the ranks that had it."""

    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_heads(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.to_tokens(dy), None


class ToTokens(torch.autograd.Function):
    """:meth:`Exchange.to_tokens`."""

    @staticmethod
    def forward(ctx, y: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.to_heads(dx), None


def _as_map(head_map: HeadMap | Sequence[int], k: Tensor) -> HeadMap:
    if isinstance(head_map, HeadMap):
        return head_map
    return HeadMap(head_map, k.shape[1])


def _lengths(
    ranks: Ring, q_lengths: Sequence[int] | None, kv_lengths: Sequence[int] | None,
    num_queries: int, num_keys: int,
) -> tuple[Sequence[int], Sequence[int]]:  # fmt: skip
    """Queries and keys of every rank."""
    if q_lengths is None or kv_lengths is None:
        lengths: list[tuple[int, int]] = [(0, 0)] * ranks.world
        dist.all_gather_object(lengths, (num_queries, num_keys), group=ranks.group)
        found = [list(x) for x in zip(*lengths, strict=True)]
        q_lengths = found[0] if q_lengths is None else q_lengths
        kv_lengths = found[1] if kv_lengths is None else kv_lengths
    for name, given, own in (
        ("q_lengths", q_lengths, num_queries), ("kv_lengths", kv_lengths, num_keys),
    ):  # fmt: skip
        if len(given) != ranks.world:
            raise ValueError(
                f"{name} must have one entry per rank ({ranks.world}), got {len(given)}"
            )
        if given[ranks.rank] != own:
            raise ValueError(
                f"{name}[{ranks.rank}] must be this rank's number of tokens ({own}), got "
                f"{given[ranks.rank]}"
            )
    return q_lengths, kv_lengths
