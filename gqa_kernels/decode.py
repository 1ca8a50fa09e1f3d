"""asym_gqa_decode: attention of new queries over a cache; and the planner behind many of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import plain
from ..backends.base import Backend
from ..backends.dispatch import select
from ..head_map import HeadMap
from ..inputs import UNBOUNDED, HeadMapLike, Layout
from .base import KVCache, from_heads_first
from .inputs import AppendInputs, CacheInputs, to_heads_first
from .view import KVView


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
    value_head_map: HeadMapLike | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    deterministic: bool = False,
    advance: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last tokens of each sequence over its cache: decode, or a chunk of prefill.

    The formula and the options are those of :func:`gqa_kernels.asym_gqa_attention`, with the
    cache's length of a sequence (and head) for ``n``: the queries are its last tokens. With
    ``k_new`` and ``v_new`` these are appended first and count as keys. Forward only, but for the
    reference.

    Args:
        q: ``[B, Hq, Sq, D]`` (``[B, Sq, Hq, D]`` for layout ``"bshd"``), any ``Sq``; or packed
            ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        cache: a :class:`~gqa_kernels.DenseKVCache` or :class:`~gqa_kernels.PagedKVCache`.
        head_map, value_head_map: as for ``asym_gqa_attention``, over the cache's heads.
        k_new: ``[B, Hk, Sq, D]``, or packed ``[total_q, Hk, D]``: keys of the queries' tokens.
        v_new: the values likewise.
        cu_seqlens_q: ``[B + 1]`` integers: sequence ``b`` has the queries ``cu_seqlens_q[b]`` up to
            ``cu_seqlens_q[b + 1]``.
        max_seqlen_q: most queries of a sequence; needed where ``cu_seqlens_q`` is on a device.
        rotary_cos, rotary_sin, rotary_interleaved: rotate k_new and q by their positions, as
            :meth:`~gqa_kernels.cache.base.KVCache.append` says.
        causal, scale, window, softcap, alibi_slopes, sinks: as for ``asym_gqa_attention``.
        attn_mask: broadcastable to ``[B, Hq, Sq, capacity]``, over the keys of a sequence.
        advance: count the appended tokens in ``cache.lengths``. Caches of several layers may share
            one ``lengths``: then only the last one advances it.
        layout, return_lse, deterministic, backend: as for ``asym_gqa_attention``.

    Returns:
        out in q's shape (last dim ``Dv``) and dtype; with ``return_lse`` also the LSE, fp32
        ``[B, Hq, Sq]``, or ``[Hq, total_q]`` where packed. What stands at packed tokens of no
        sequence is unspecified.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``asym_gqa_attention``; nothing was appended.
    """
    if (
        cu_seqlens_q is None and rotary_cos is None and rotary_sin is None
        and value_head_map is None and window is None and softcap is None and alibi_slopes is None
        and sinks is None and attn_mask is None and layout == "bhsd" and backend in ("auto", "cpu")
        and isinstance(cache, KVCache) and not torch.compiler.is_compiling()
    ):  # fmt: skip
        view = cache.unchecked_view()
        if k_new is not None or plain.slots_exist(view, 0):
            found = _plain_step(q, view, head_map, k_new, v_new, causal, scale, return_lse)
            if found is not None:
                if k_new is not None and advance:
                    cache.advance(k_new.shape[2])
                return found if return_lse else found[0]
    plan = plan_decode(
        q, cache, head_map, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        value_head_map=value_head_map, causal=causal, scale=scale, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, attn_mask=attn_mask, layout=layout,
        deterministic=deterministic, backend=backend,
    )  # fmt: skip
    result = plan(
        q, cache, k_new, v_new, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved, return_lse=return_lse,
    )  # fmt: skip
    if k_new is not None and advance:
        cache.advance(plan.new_tokens)
    return result


def _plain_step(
    q: Tensor, view: KVView, head_map: object, k_new: Tensor | None, v_new: Tensor | None,
    causal: bool, scale: float | None, lse_wanted: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Append and attend the short way. None where that can't be: then nothing was written but
    where a later append writes anyway, beyond the lengths."""
    if not isinstance(q, Tensor) or not isinstance(head_map, HeadMap):
        return None
    if k_new is not None:
        if not isinstance(k_new, Tensor) or q.dtype != k_new.dtype:
            return None
        if q.shape[2:3] != k_new.shape[2:3] or not plain.append(view, k_new, v_new):
            return None
        view = replace(view, kv_lengths=view.kv_lengths + k_new.shape[2])
    elif v_new is not None:
        return None
    return plain.attend_cache(q, view, head_map, causal, scale, lse_wanted)


@dataclass(frozen=True)
class DecodePlan:
    """What the layers of a decode step have in common; made by :func:`plan_decode`.

    A call of it takes one layer's queries and cache. It chooses no backend, looks at no values of
    tensors on a device, and waits for none, so it can be captured in a CUDA graph: lengths, page
    tables and head maps in tensors are read when the kernels run and may change between replays;
    shapes may not. How the keys are split follows from shapes alone.

    Attributes:
        inputs: the checked call; lengths are those before an append.
        layout: of q, k_new, v_new and out.
        backend: what runs it.
        is_plain: whether layers may take the short way (:mod:`gqa_kernels.backends.plain`).
    """

    inputs: CacheInputs
    layout: Layout
    backend: Backend
    is_plain: bool = False

    @property
    def new_tokens(self) -> int | Tensor:
        """Query tokens per sequence: a number, or ``[B]`` where they are packed."""
        offsets = self.inputs.q_offsets
        return self.inputs.max_q_len if offsets is None else offsets.diff()

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
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One layer: append ``k_new`` and ``v_new``, if any, and attend, as
        :func:`asym_gqa_decode` does. ``cache.lengths`` is left as it is: advance it once a step.

        Args:
            cache: memory of the planned shapes; lengths and page table are those of the plan.
        """
        inputs = self.inputs
        if (
            self.is_plain and rotary_cos is None and rotary_sin is None and isinstance(q, Tensor)
            and not torch.compiler.is_compiling()
        ):  # fmt: skip
            layer, planned = cache.unchecked_view(), inputs.view
            if (
                layer.k.shape == planned.k.shape and layer.v.shape == planned.v.shape
                and layer.k.dtype == planned.k.dtype and q.shape == inputs.q.shape
            ):  # fmt: skip
                if layer is not planned:
                    layer = KVView(
                        layer.k, layer.v, planned.kv_lengths, planned.page_table, planned.kv_begin,
                        layer.k_scale, layer.v_scale, layer.k_zero, layer.v_zero,
                    )  # fmt: skip
                found = _plain_step(
                    q, layer, inputs.head_map, k_new, v_new, inputs.window_right == 0,
                    inputs.scale, return_lse,
                )  # fmt: skip
                if found is not None:
                    return found if return_lse else found[0]
        packed = inputs.q_offsets is not None
        view = inputs.view.with_storage(cache.k, cache.v, **cache.scales)
        if (k_new is None) != (v_new is None):
            raise ValueError("k_new and v_new must be given together, got one of them")
        if k_new is not None:
            append = AppendInputs.create(
                k_new, v_new, view, q=q, new_offsets=inputs.q_offsets, max_new=inputs.max_q_len,
                rotary_cos=rotary_cos, rotary_sin=rotary_sin,
                rotary_interleaved=rotary_interleaved, layout=self.layout,
            )  # fmt: skip
            q = select(append, self.backend.name).append(append)
            new = self.new_tokens[:, None] if packed else inputs.max_q_len
            view = replace(view, kv_lengths=view.kv_lengths + new)
        elif rotary_cos is not None:
            raise ValueError("rotary_cos must be None where there is no k_new to rotate")
        else:
            q, _ = to_heads_first("q", q, self.layout, packed)
        if q.shape != inputs.q.shape or q.dtype != inputs.dtype:
            raise ValueError(
                f"q must be as planned, {tuple(inputs.q.shape)} in {inputs.dtype} as [B, Hq, S, "
                f"D], got {tuple(q.shape)} in {q.dtype}"
            )
        out, lse = self.backend.run_cache(replace(inputs, q=q, view=view, lse_wanted=return_lse))
        out = from_heads_first(out, self.layout, packed)
        return (out, lse[0] if packed else lse) if return_lse else out


def plan_decode(
    q: Tensor, cache: KVCache, head_map: HeadMapLike, *, backend: str = "auto", **options
) -> DecodePlan:
    """Check a decode step and choose what runs it, once for all layers.

    Args:
        q: queries of some layer; shape, strides and dtype count.
        cache: the cache of some layer. Its lengths and page table serve every layer.
        head_map, options, backend: as :func:`asym_gqa_decode` has them, ``cu_seqlens_q`` included,
            without those of the append and of the result.
    """
    inputs = decode_inputs(q, cache, head_map, **options)
    layout, chosen = options.get("layout", "bhsd"), select(inputs, backend)
    return DecodePlan(inputs, layout, chosen, chosen.name == "cpu" and _is_plain(inputs))


def _is_plain(inputs: CacheInputs) -> bool:
    """Whether a call has none of the options that the short way leaves out."""
    return (
        inputs.layout == "bhsd" and inputs.q_offsets is None and inputs.value_head_map is None
        and inputs.window_left == UNBOUNDED and inputs.window_right in (0, UNBOUNDED)
        and inputs.softcap == 0.0 and inputs.alibi_slopes is None and inputs.sinks is None
        and inputs.attn_mask is None
    )  # fmt: skip


def decode_inputs(
    q: Tensor,
    cache: KVCache,
    head_map: HeadMapLike,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    **options,
) -> CacheInputs:
    """The checked call of a decode step."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a DenseKVCache or PagedKVCache, got {type(cache).__name__}")
    return CacheInputs.create(
        q, cache.view(), head_map, q_offsets=cu_seqlens_q, max_q_len=max_seqlen_q, **options
    )
