"""Context parallelism: attention over keys on different ranks, merged through the LSE.

:func:`context_parallel_attention` is for prefill and training: every rank has some of the queries
and some of the keys. K and V travel around the ring of ranks while each rank attends to the keys
that it holds (Ring Attention, arXiv 2310.01889). Backward sends them around again together with
their gradients. No rank ever holds more than two ranks' keys.

:func:`context_parallel_decode` is for decode: every rank has all queries and its part of the cache.
The ranks exchange outputs and LSEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import attention_call
from ..backends.dispatch import select
from ..cache.base import KVCache
from ..cache.tensors import Layout
from ..call.checks import HeadMapLike
from ..call.keywords import PackedKeywords, PartKeywords
from ..call.options import UNBOUNDED, Options
from ..cascade import merge_attention_states, merge_sinks
from ..decode import asym_gqa_decode
from .ring import Call, Range, Ranges, Ring, RingAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack


def contiguous_ranges(lengths: Sequence[int], begin: int = 0) -> list[list[Range]]:
    """Consecutive ranges: rank ``r`` has the ``lengths[r]`` tokens after those of rank ``r -
    1``."""
    return [[run] for run in pairwise(accumulate(lengths, initial=begin))]


def zigzag_ranges(length: int, world: int) -> list[list[Range]]:
    """Two ranges per rank, one from each end of the sequence. This balances the work of causal
    attention (Llama 3, arXiv 2407.21783, section 3.3.2).

    Examples:
        >>> from gqa_kernels.parallel.context import zigzag_ranges
        >>> zigzag_ranges(16, 2)  # both ranks have as much causal work
        [[(0, 4), (12, 16)], [(4, 8), (8, 12)]]
    """
    pieces = 2 * world
    runs = [(length * i // pieces, length * (i + 1) // pieces) for i in range(pieces)]
    return [[runs[rank], runs[pieces - 1 - rank]] for rank in range(world)]


class _ContextKeywords(PackedKeywords, total=False):
    q_ranges: Ranges | None
    kv_ranges: Ranges | None
    layout: Layout
    group: dist.ProcessGroup | None


class _ContextDecodeKeywords(PartKeywords, total=False):
    newest: int | None
    layout: Layout
    deterministic: bool
    group: dist.ProcessGroup | None


@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_lse: Literal[False] = False,
    **keywords: Unpack[_ContextKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_lse: Literal[True],
    **keywords: Unpack[_ContextKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_lse: bool,
    **keywords: Unpack[_ContextKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: HeadMapLike,
    *,
    q_ranges: Ranges | None = None,
    kv_ranges: Ranges | None = None,
    value_head_map: HeadMapLike | None = None,
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gqa_kernels.asym_gqa_attention` of this rank's queries over the keys of all ranks.

    Every rank of the group must call it, with its own q, k and v and otherwise the same arguments.
    If one rank's q, k or v requires a gradient, all ranks' must. All ranks must then run backward,
    which communicates. The gradient of ``sinks`` covers this rank's queries only: sum it over the
    group, like that of any parameter.

    Args:
        q: ``[B, Hq, Sq, D]``, this rank's queries; k and v ``[B, Hkv, Sk, D or Dv]`` its keys.
            There may be any number of tokens, even 0. They are packed into a buffer before they are
            sent.
        q_ranges, kv_ranges: positions of every rank's tokens in the whole sequence. By default
            rank r's tokens follow rank r-1's, and the last query is at the last key. The ranks then
            exchange their lengths first, and wait for them.
        alibi_slopes: for causal attention only; not differentiable.
        group: process group; default the world.
        others: as for ``asym_gqa_attention``. Causality and windows refer to positions in the whole
            sequence, and sinks count once.

    Returns:
        as ``asym_gqa_attention``, for this rank's queries.

    Raises:
        ValueError, TypeError: as ``asym_gqa_attention``, and for ranges that don't fit.
        NotImplementedError: slopes that require a gradient, or are given without ``causal``.

    Examples:
        >>> ranges = zigzag_ranges(length, world)  # q, k, v: this rank's tokens, in this order
        >>> out = context_parallel_attention(
        ...     q, k, v, head_map, causal=True, q_ranges=ranges, kv_ranges=ranges
        ... )
    """
    ring = Ring.of(group)
    axis = 1 if layout == "bshd" else 2
    if alibi_slopes is not None and (not causal or alibi_slopes.requires_grad):
        raise NotImplementedError(
            "alibi_slopes must come with causal=True and require no gradient in context parallel "
            f"attention, got causal={causal}, requires_grad={alibi_slopes.requires_grad}"
        )
    if q_ranges is None or kv_ranges is None:
        q_ranges, kv_ranges = _default_ranges(ring, q.shape[axis], k.shape[axis])
    _check_ranges("q_ranges", q_ranges, ring, q.shape[axis])
    _check_ranges("kv_ranges", kv_ranges, ring, k.shape[axis])
    options = Options.of(causal, window=window)
    left, right = (
        None if side == UNBOUNDED else side for side in (options.window_left, options.window_right)
    )
    call = Call(
        ring, q_ranges[ring.rank], kv_ranges, left, right, alibi_slopes, axis, layout,
        {
            "head_map": head_map, "value_head_map": value_head_map, "scale": scale,
            "softcap": softcap, "backend": backend,
        },
    )  # fmt: skip
    inputs = attention_call(
        q, k, v, alibi_slopes=alibi_slopes, sinks=sinks, layout=layout, causal=causal,
        window=window, **{name: x for name, x in call.options.items() if name != "backend"},
    )  # fmt: skip
    inputs.check()
    select(inputs, backend)  # raises an error now if no backend can run the parts
    out, lse = RingAttention.apply(q, k, v, call)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks, layout=layout)
    return (out, lse) if return_lse else out


@overload
def context_parallel_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_lse: Literal[False] = False,
    **keywords: Unpack[_ContextDecodeKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def context_parallel_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_lse: Literal[True],
    **keywords: Unpack[_ContextDecodeKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def context_parallel_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_lse: bool,
    **keywords: Unpack[_ContextDecodeKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def context_parallel_decode(
    q: Tensor,
    cache: KVCache,
    head_map: HeadMapLike,
    *,
    newest: int | None = None,
    value_head_map: HeadMapLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    deterministic: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of each sequence over caches on all ranks.

    Every rank calls it with the same queries and its own part of the cache. The queries' keys must
    already be in some rank's cache (``cache.append``). Windows and ALiBi are not supported, because
    they depend on distances across the parts.

    Args:
        q: ``[B, Hq, Sq, D]`` (``[B, Sq, Hq, D]`` for layout ``"bshd"``), the same on all ranks.
        cache: this rank's keys of each sequence, possibly none. Any rank may hold any key, because
            keys carry no positions.
        newest: the rank, within the group, whose cache ends with the keys of the queries' tokens.
            Required if there is more than one query.
        others: as for :func:`gqa_kernels.asym_gqa_decode`; sinks count once.

    Returns:
        as ``asym_gqa_decode``, the same on all ranks.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``asym_gqa_decode``; or ``newest`` is missing
            or not a rank; or a query requires a gradient.

    Examples:
        >>> out = context_parallel_decode(q, cache, head_map)  # the cache holds a part of the keys
    """
    ring = Ring.of(group)
    q_len = q.shape[1 if layout == "bshd" else 2]
    if torch.is_grad_enabled() and q.requires_grad:
        raise NotImplementedError(
            "context_parallel_decode is forward only: call it under torch.no_grad()"
        )
    if newest is None and q_len > 1:
        raise ValueError(f"newest must be given for {q_len} queries per sequence, got None")
    if newest is not None and not 0 <= newest < ring.world:
        raise ValueError(f"newest must lie in [0, {ring.world}), got {newest}")
    out, lse = asym_gqa_decode(
        q, cache, head_map, value_head_map=value_head_map, scale=scale, softcap=softcap,
        causal=ring.rank == newest, layout=layout, return_lse=True, deterministic=deterministic,
        backend=backend,
    )  # fmt: skip
    out, lse = merge_over_ranks(out, lse, layout=layout, group=group)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks, layout=layout)
    return (out, lse) if return_lse else out


def merge_over_ranks(
    out: Tensor, lse: Tensor, *, layout: Layout = "bhsd", group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries over each rank's keys into attention over all keys.

    Args:
        out, lse: in the form of :func:`gqa_kernels.merge_attention_states`. Not differentiable.

    Returns:
        out in its type and the LSE, fp32, bitwise the same on all ranks.
    """
    ring = Ring.of(group)
    sent = torch.cat([out.detach().flatten().to(lse.dtype), lse.detach().flatten()])
    received = [torch.empty_like(sent) for _ in range(ring.world)]
    dist.all_gather(received, sent, group=ring.group)
    states = [
        (state[: out.numel()].view(out.shape), state[out.numel() :].view(lse.shape))
        for state in received
    ]
    merged = states[0]
    for state in states[1:]:
        merged = merge_attention_states(*merged, *state, layout=layout)
    return merged[0].to(out.dtype), merged[1]


def _default_ranges(ring: Ring, num_queries: int, num_keys: int) -> tuple[Ranges, Ranges]:
    lengths: list[tuple[int, int]] = [(0, 0)] * ring.world
    dist.all_gather_object(lengths, (num_queries, num_keys), group=ring.group)
    queries, keys = zip(*lengths, strict=True)
    return contiguous_ranges(queries, sum(keys) - sum(queries)), contiguous_ranges(keys)


def _check_ranges(name: str, ranges: Ranges, ring: Ring, num_tokens: int) -> None:
    """Check ranges: one entry per rank, this rank's of the right length, and no position twice."""
    if len(ranges) != ring.world:
        raise ValueError(f"{name} must have one entry per rank ({ring.world}), got {len(ranges)}")
    mine = sum(end - begin for begin, end in ranges[ring.rank])
    if mine != num_tokens:
        raise ValueError(
            f"{name}[{ring.rank}] must cover this rank's {num_tokens} tokens, got {mine}"
        )
    runs = sorted(run for entry in ranges for run in entry)
    for (begin, end), following in zip(runs, [*runs[1:], None], strict=True):
        if begin > end or (following is not None and following[0] < end):
            raise ValueError(
                f"{name} must be runs [begin, end) of positions, none of them twice, got "
                f"({begin}, {end}) and {following}"
            )
