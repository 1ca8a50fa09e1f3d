"""asym_gqa_decode: attention of new queries over a cache; the append; and the plan of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .backends.auxiliary import attend_with_auxiliary
from .backends.base import Backend
from .backends.dispatch import select
from .backends.into import attend_into
from .cache.base import KVCache
from .cache.tensors import Layout
from .cache.view import KVView
from .call.append import AppendCall
from .call.attention import AttentionCall
from .call.auxiliary import AuxOutput, AuxRequest, as_aux_request
from .call.checks import HeadMapLike, from_heads_first, heads_first
from .call.keywords import DecodeKeywords, StepKeywords
from .call.options import Options
from .keep import keep
from .native.arguments import as_bool
from .write import write

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def asym_gqa_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_lse: Literal[False] = False,
    **keywords: Unpack[DecodeKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def asym_gqa_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_lse: Literal[True],
    **keywords: Unpack[DecodeKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def asym_gqa_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_lse: bool,
    **keywords: Unpack[DecodeKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def asym_gqa_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, return_aux: AuxRequest,
    **keywords: Unpack[DecodeKeywords],
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip


def asym_gqa_decode(
    q: Tensor,
    cache: KVCache,
    head_map: HeadMapLike,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_positions: Tensor | None = None,
    value_head_map: HeadMapLike | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_ranges: Tensor | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    advance: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Attention of the last tokens of each sequence over its cache: decode, or a chunk of prefill.

    The formula and the options are those of :func:`gqa_kernels.asym_gqa_attention`, with the
    cache's length of a sequence (and head) for ``n``: the queries are its last tokens. With
    ``k_new`` and ``v_new`` these are appended first and count as keys. Forward only, but for the
    reference. NaN and infinities at hidden keys act as in :func:`gqa_kernels.asym_gqa_attention`;
    slots that hold no key are never used.

    Args:
        q: ``[B, Hq, Sq, D]`` (``[B, Sq, Hq, D]`` for layout ``"bshd"``), any ``Sq``; or packed
            ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        cache: a :class:`~gqa_kernels.DenseKVCache` or :class:`~gqa_kernels.PagedKVCache`.
        head_map, value_head_map: as for ``asym_gqa_attention``, over the cache's heads.
        k_new: ``[B, Hk, Sq, D]``, or packed ``[total_q, Hk, D]``: keys of the queries' tokens.
        v_new: the values likewise.
        cu_seqlens_q: ``[B + 1]`` integers: sequence ``b`` has the queries ``cu_seqlens_q[b]`` up to
            ``cu_seqlens_q[b + 1]``.
        max_seqlen_q: most queries of a sequence; needed if ``cu_seqlens_q`` is on a device.
        rotary_cos, rotary_sin, rotary_interleaved, rotary_positions: rotate k_new and q by their
            positions, as :meth:`~gqa_kernels.cache.base.KVCache.append` says.
        causal, scale, window, softcap, alibi_slopes, sinks: as for ``asym_gqa_attention``.
        attn_mask: broadcastable to ``[B, Hq, Sq, capacity]``, over the keys of a sequence. It may
            have fewer keys than the capacity: the others are hidden. With ``cu_seqlens_q``, Sq is
            ``max_seqlen_q``, and queries are counted in their sequence (on the CPU and in the
            reference).
        key_ranges: ``[B, 1 or Hq, Sq, 2]``, as for ``asym_gqa_attention``, over the keys of a
            sequence. With ``cu_seqlens_q``, Sq is ``max_seqlen_q``, and queries are counted in
            their sequence.
        advance: count the appended tokens in ``cache.lengths``. Caches of several layers may share
            one ``lengths``: then only the last one advances it.
        layout, return_lse, return_aux, out, lse, deterministic, batch_invariant, backend: as for
            ``asym_gqa_attention``. Key scores are ``[B, Hk, capacity]``.

    Returns:
        out in q's shape (last dim ``Dv``) and dtype; with ``return_lse`` also the LSE, fp32
        ``[B, Hq, Sq]``, or ``[Hq, total_q]`` if packed. The output at packed tokens of no
        sequence is unspecified.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``asym_gqa_attention``; nothing was appended.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache, asym_gqa_decode
        >>> cache = DenseKVCache.empty(batch=1, num_kv_heads=2, capacity=64, head_dim=16)
        >>> q, k, v = (torch.randn(1, heads, 7, 16, dtype=torch.bfloat16) for heads in (3, 2, 2))
        >>> out = asym_gqa_decode(q, cache, [0, 0, 1], k_new=k, v_new=v)  # append, then attend
        >>> cache.lengths.tolist()
        [7]
    """
    if deterministic is not False:
        as_bool("deterministic", deterministic)
    if advance is not True:
        advance = as_bool("advance", advance)
    call = decode_call(
        q, cache, head_map, causal=causal, scale=scale, window=window, softcap=softcap,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, value_head_map=value_head_map,
        alibi_slopes=alibi_slopes, sinks=sinks, attn_mask=attn_mask, key_ranges=key_ranges,
        layout=layout, batch_invariant=batch_invariant,
    )  # fmt: skip
    plan = DecodePlan(call, layout, select(call, backend))
    if k_new is None:
        call.kv.check_slots(0)
    result = plan._step(
        call, cache, k_new, v_new, rotary_cos, rotary_sin, rotary_interleaved, rotary_positions,
        return_lse, return_aux, out, lse,
    )  # fmt: skip
    if k_new is not None and advance:
        cache.advance(plan.new_tokens)
    return result


def decode_call(q: Tensor, cache: KVCache, head_map: HeadMapLike, **options: Any) -> AttentionCall:
    """The call that :func:`asym_gqa_decode` makes of its arguments, without new tokens. Over a
    cache that transforms keys, the queries are still to be matched with them."""
    _check_cache(cache)
    call = view_call(q, cache.unchecked_view(), head_map, **options)
    _check_distances(call, cache)
    return call


def _check_cache(cache: object) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a DenseKVCache or PagedKVCache, got {type(cache).__name__}")


def _check_distances(call: AttentionCall, cache: KVCache) -> None:
    """A window and ALiBi need how far keys are from queries, which kept keys don't say."""
    if cache.next_positions is None:
        return
    for name, used in (
        ("window", call.options.window_left >= 0 or call.options.window_right > 0),
        ("alibi_slopes", call.alibi_slopes is not None),
    ):
        if used:
            raise NotImplementedError(
                f"{name} must be None over a cache whose keys were chosen by keep(): their "
                "distance from a query is not stored"
            )


def view_call(
    q: Tensor, view: KVView, head_map: HeadMapLike, *, causal: bool = True,
    scale: float | None = None, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, batch_invariant: bool = False, **tensors: Any,
) -> AttentionCall:  # fmt: skip
    """:func:`decode_call` over the view of a cache."""
    options = Options.of(causal, scale, window, softcap, batch_invariant=batch_invariant)
    return AttentionCall.over(q, view, head_map, options, **tensors)


def plan_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, backend: str = "auto",
    deterministic: bool = False, **options: Any,
) -> DecodePlan:  # fmt: skip
    """Check a decode step and choose what runs it, once for all layers.

    Args:
        q: queries of some layer; shape, strides and dtype count.
        cache: the cache of some layer. Its lengths and page table serve every layer.
        head_map, options, backend: as :func:`asym_gqa_decode` has them, ``cu_seqlens_q`` included,
            without those of the append and of the result.
        deterministic: as for :func:`asym_gqa_decode`.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache, plan_decode
        >>> layers = [DenseKVCache.empty(1, 2, 64, 16, dtype=torch.float32) for _ in range(3)]
        >>> q, k, v = (torch.randn(1, heads, 1, 16) for heads in (3, 2, 2))
        >>> plan = plan_decode(q, layers[0], [0, 0, 1])
        >>> outs = [plan(q, layer, k, v) for layer in layers]
    """
    as_bool("deterministic", deterministic)
    call = decode_call(q, cache, head_map, **options)
    chosen = select(call, backend)
    call.check()
    call.kv.check_slots(0)
    return DecodePlan(call, options.get("layout", "bhsd"), chosen)


@dataclass(slots=True, eq=False)
class DecodePlan:
    """What the layers of a decode step have in common; made by :func:`plan_decode`.

    Calling it takes one layer's queries and cache. It chooses no backend, reads no values of
    tensors on a device, and waits for none, so it can be captured in a CUDA graph: lengths, page
    tables and head maps in tensors are read when the kernels run and may change between replays;
    shapes may not. How the keys are split follows from shapes alone.

    Attributes:
        call: the checked call; lengths are those before an append.
        layout: of q, k_new, v_new and out.
        backend: what runs it.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache, plan_decode
        >>> cache = DenseKVCache.empty(1, 2, 64, 16, dtype=torch.float32)
        >>> q, k, v = (torch.randn(1, heads, 1, 16) for heads in (3, 2, 2))
        >>> plan = plan_decode(q, cache, [0, 0, 1])
        >>> out = plan(q, cache, k, v)
        >>> cache.advance(plan.new_tokens)
    """

    call: AttentionCall
    layout: Layout
    backend: Backend

    @property
    def new_tokens(self) -> int | Tensor:
        """Query tokens per sequence: a number, or ``[B]`` if they are packed."""
        offsets = self.call.q_offsets
        return self.call.q.shape[2] if offsets is None else offsets.diff()

    @overload
    def __call__(
        self, q: Tensor, cache: KVCache, k_new: Tensor | None = None,
        v_new: Tensor | None = None, *, return_lse: Literal[False] = False,
        **keywords: Unpack[StepKeywords],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Tensor, cache: KVCache, k_new: Tensor | None = None,
        v_new: Tensor | None = None, *, return_lse: Literal[True],
        **keywords: Unpack[StepKeywords],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Tensor, cache: KVCache, k_new: Tensor | None = None,
        v_new: Tensor | None = None, *, return_lse: bool,
        **keywords: Unpack[StepKeywords],
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Tensor, cache: KVCache, k_new: Tensor | None = None,
        v_new: Tensor | None = None, *, return_aux: AuxRequest,
        **keywords: Unpack[StepKeywords],
    ) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip

    def __call__(
        self,
        q: Tensor,
        cache: KVCache,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        *,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
        rotary_positions: Tensor | None = None,
        return_lse: bool = False,
        return_aux: AuxRequest | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
        """One layer: append ``k_new`` and ``v_new``, if any, and attend, as
        :func:`asym_gqa_decode` does. ``cache.lengths`` is left as it is: advance it once a step.

        Args:
            cache: memory of the planned shapes; lengths and page table are those of the plan.
        """
        _check_cache(cache)
        planned = self.call
        packed = planned.q_offsets is not None
        if packed or self.layout != "bhsd" or type(q) is not Tensor or q.dim() != 4:
            q = heads_first("q", q, self.layout, packed)
        if q.shape != planned.q.shape or q.dtype != planned.q.dtype:
            raise ValueError(
                f"q must be as planned, {tuple(planned.q.shape)} in {planned.q.dtype} as [B, Hq, "
                f"S, D], got {tuple(q.shape)} in {q.dtype}"
            )
        call = planned.with_q(q, planned.kv.with_memory(cache.unchecked_view()))
        _check_distances(call, cache)
        return self._step(
            call, cache, k_new, v_new, rotary_cos, rotary_sin, rotary_interleaved,
            rotary_positions, return_lse, return_aux, out, lse,
        )  # fmt: skip

    def _step(
        self, call: AttentionCall, cache: KVCache, k_new: Tensor | None, v_new: Tensor | None,
        rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool,
        rotary_positions: Tensor | None, return_lse: bool, return_aux: AuxRequest | None,
        out: Tensor | None, lse: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:  # fmt: skip
        """Append the new tokens, if any, and attend."""
        if return_lse is not False:
            return_lse = as_bool("return_lse", return_lse)
        aux = None if return_aux is None else as_aux_request(return_aux, return_lse)
        if aux is not None and not (out is None and lse is None):
            raise ValueError("out and lse must be None with return_aux, got a tensor")
        offsets = call.q_offsets
        packed = offsets is not None
        if (k_new is None) != (v_new is None):
            raise ValueError("k_new and v_new must be given together, got one of them")
        if k_new is not None and v_new is not None:
            append = AppendCall.create(
                k_new, v_new, call.kv, cu_seqlens=offsets, max_seqlen=call.max_q_len,
                rotary_cos=rotary_cos, rotary_sin=rotary_sin,
                rotary_interleaved=rotary_interleaved, rotary_positions=rotary_positions,
                next_positions=cache.next_positions, key_transform=cache.key_transform,
                layout=self.layout, q_heads_first=call.q,
            )  # fmt: skip
            rotated = select(append, self.backend.name).append(append)
            if rotated is not None:
                call.q = rotated
            call.kv = call.kv.with_more(
                append.max_new if offsets is None else offsets.diff()[:, None]
            )
        elif rotary_cos is not None:
            raise ValueError("rotary_cos must be None where there is no k_new to rotate")
        elif rotary_positions is not None:
            raise ValueError("rotary_positions must be None where there is no k_new to rotate")
        if cache.key_transform is not None:
            call.q = cache.matching_queries(call.q, call.head_map_tensor)
        if out is not None or lse is not None:
            return attend_into(call, self.backend, out, lse, return_lse, self.layout)
        call.lse_wanted = return_lse
        if aux is None:
            out, found = self.backend.attend(call)
        else:
            out, more = attend_with_auxiliary(call, aux, self.backend)
        if packed or self.layout != "bhsd":
            out = from_heads_first(out, self.layout, packed)
        if aux is not None:
            if packed and more.lse is not None:
                more = more._replace(lse=more.lse[0])
            return out, more
        found = found[0] if packed and return_lse else found
        return (out, found) if return_lse else out


def append(
    cache: KVCache,
    k_new: Tensor,
    v_new: Tensor,
    *,
    q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_positions: Tensor | None = None,
    layout: Layout = "bhsd",
    advance: bool = True,
    backend: str = "auto",
) -> Tensor | None:
    """Append new tokens to each sequence: rotate them, and quantise them if the cache is quantised.

    Args:
        k_new: ``[B, Hk, S, D]`` (``[B, S, Hk, D]`` for layout ``"bshd"``), or packed
            ``[total, Hk, D]`` with ``cu_seqlens``.
        v_new: ``[B, Hv, S, Dv]`` likewise.
        q: queries of the same tokens, to rotate too; not modified.
        cu_seqlens: ``[B + 1]`` integers: the new tokens of sequence ``b`` are
            ``cu_seqlens[b]`` up to ``cu_seqlens[b + 1]``.
        max_seqlen: most new tokens of a sequence; needed if ``cu_seqlens`` is on a device.
        rotary_cos, rotary_sin: ``[max_position, R / 2]``, cosines and sines of the angles: the
            first ``R`` columns of k_new and q are rotated by the angle of their position, which
            is the length before the append plus the token's index. Contiguous tables in fp32 or the
            tokens' dtype are read as they are. Others are copied first: strided tables, other
            floating dtypes, and tables ``[max_position, R]`` with ``R > D / 2`` that hold every
            angle twice.
        rotary_interleaved: pairs are columns ``(2i, 2i + 1)`` and not ``(i, i + R / 2)``.
        rotary_positions: ``[B, S]`` integers, or packed ``[total]``: positions of the new tokens,
            the rows of the tables that they are rotated by. Default: those behind
            ``cache.next_positions`` if it is set, else those behind the length. Other positions
            than those of the length cost a copy of the new tokens.
        advance: add the new tokens to ``lengths``. Caches of several layers may share one
            ``lengths``: then only the last one advances it.
        backend: as in :func:`gqa_kernels.asym_gqa_attention`.

    Returns:
        the rotated queries (q itself without a rotary table), or None without queries.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache
        >>> cache = DenseKVCache.empty(batch=1, num_kv_heads=2, capacity=64, head_dim=16)
        >>> k, v = torch.randn(2, 1, 2, 7, 16, dtype=torch.bfloat16)
        >>> cache.append(k, v)
        >>> cache.lengths.tolist()
        [7]
    """
    if advance is not True:
        advance = as_bool("advance", advance)
    call = AppendCall.create(
        k_new, v_new, cache.unchecked_view(), q=q, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        rotary_positions=rotary_positions, next_positions=cache.next_positions,
        key_transform=cache.key_transform, layout=layout,
    )  # fmt: skip
    rotated = select(call, backend).append(call)
    if advance:
        cache.advance(call.max_new if cu_seqlens is None else cu_seqlens.diff())
    return None if rotated is None else from_heads_first(rotated, layout, cu_seqlens is not None)


# Methods of every cache, which as memory knows no backend.
KVCache.append = append
KVCache.keep = keep
KVCache.write = write
