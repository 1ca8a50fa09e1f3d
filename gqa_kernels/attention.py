"""asym_gqa_attention: attention over dense tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .backends.auxiliary import attend_with_auxiliary
from .backends.dispatch import choose, select
from .backends.into import attend_into
from .cache.tensors import Layout
from .call.attention import AttentionCall
from .call.auxiliary import AuxOutput, AuxRequest, as_aux_request
from .call.checks import HeadMapLike
from .call.keywords import AttentionKeywords
from .native.arguments import as_bool

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def asym_gqa_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_lse: Literal[False] = False,
    **keywords: Unpack[AttentionKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def asym_gqa_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_lse: Literal[True],
    **keywords: Unpack[AttentionKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def asym_gqa_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_lse: bool,
    **keywords: Unpack[AttentionKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def asym_gqa_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, *, return_aux: AuxRequest,
    **keywords: Unpack[AttentionKeywords],
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip


def asym_gqa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: HeadMapLike,
    *,
    value_head_map: HeadMapLike | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_ranges: Tensor | None = None,
    kv_lengths: Tensor | Sequence[int] | None = None,
    dropout_p: float = 0.0,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Attention in which query head ``h`` reads KV head ``head_map[h]``, for any map.

    With ``n`` the keys of the sequence (``Sk``, or its ``kv_lengths``) and ``i' = i + n - Sq`` the
    query's position among them::

        s[h,i,j] = scale * q[h,i] . k[head_map[h],j]
        s = softcap * tanh(s / softcap)
        s += -alibi_slopes[h] * |i' - j| + additive mask
        out[h,i] = softmax over visible j of s[h,i,j] . v[value_head_map[h],j]

    Scores and softmax are fp32, P has q's dtype. A query that sees no key gives 0. Inputs are read
    through their strides, never copied or modified; the last dim must be contiguous.

    NaN and infinities at a key that a mask, causality or a window hides: those in K have no effect
    on out and LSE. Those in V have none on the LSE, but turn out into NaN for queries that do not
    see the key, as with SDPA: its probability of 0 is multiplied by V. The reference does so for
    every hidden key; the fused backends do not read tiles in which a window or causality hides
    every key, nor the CPU backend those of a mask. Either may turn gradients into NaN. Slots beyond
    ``kv_lengths`` are never used.

    Differentiable in q, k, v, slopes and sinks, through the LSE too. Gradients of an additive mask,
    second derivatives, ``torch.func`` and forward mode are for the reference alone; ``vmap`` runs
    the fused kernels once per sample. Under autocast q, k and v take its type, as SDPA's do.

    Args:
        q: ``[B, Hq, Sq, D]``, fp16, bf16, fp32 or fp64 (the reference only).
        k: ``[B, Hk, Sk, D]``, q's dtype and device.
        v: ``[B, Hv, Sk, Dv]``; ``Hv = Hk`` unless ``value_head_map`` is given.
        head_map: ``Hq`` integers: a :class:`HeadMap`, a sequence, or an integer tensor. A tensor on
            an accelerator is read there, without synchronisation. If an entry of it is out of
            range, that head's output is NaN.
        value_head_map: the same for V, if K and V are grouped differently.
        causal: query ``i`` sees keys ``j <= i'`` (aligned to the bottom right).
        scale: factor of the scores; default ``D ** -0.5``.
        window: ``(left, right)`` in tokens, inclusive: keys with ``i' - left <= j <= i' + right``
            are visible; None is unbounded on that side.
        softcap: cap of the scores (Gemma 2, arXiv 2408.00118, section 2).
        alibi_slopes: ``[Hq]`` or ``[B, Hq]`` (ALiBi, arXiv 2108.12409).
        sinks: ``[Hq]``, one extra logit per head in the softmax's denominator, for queries that
            see a key.
        attn_mask: boolean (True is visible) or additive, broadcastable to ``[B, Hq, Sq, Sk]`` in
            either layout. An additive value below ``torch.finfo(torch.float32).min / 2``
            (about -1.7e38) hides the key, as -inf and ``torch.finfo(torch.float32).min`` do.
        key_ranges: integers ``[B, 1 or Hq, Sq, 2]``: query ``i`` sees the keys ``begin <= j <
            end`` of its range, besides what the other options hide: a prefix that all see, packed
            documents, the branches of a draft. The CPU backend skips keys that no query of a block
            may see. On the CPU and in the reference.
        kv_lengths: ``[B]`` or ``[B, Hk]`` integers: valid keys per sequence, or per sequence and
            key head (K and V of a query head then have that length).
        dropout_p: part of the probabilities to drop, as SDPA's: the others are divided by
            ``1 - dropout_p``. The mask follows from torch's default generator
            (``torch.manual_seed``), and is the same in every backend.
        layout: ``"bhsd"``, or ``"bshd"`` for q, k, v and out as ``[B, S, H, D]``.
        return_lse: also return the LSE.
        return_aux: an :class:`~gqa_kernels.AuxRequest`: also return an
            :class:`~gqa_kernels.AuxOutput` with the LSE, the largest score of each head, or the
            attention that each key gets from the last queries. The last two take another pass
            over the keys in eager torch, without gradient.
        out: where to write out, and what is then returned: the shape and dtype of the result, any
            strides with a contiguous last dim. Without gradient, and without ``return_aux``.
        lse: where to write the LSE, contiguous; with ``return_lse``.
        deterministic: accepted for drop-in use: results are always bitwise repeatable, backward
            included.
        batch_invariant: give a query the same bits whatever else is in the batch, however the
            prompt is cut into chunks, whatever the number of threads, and in a dense or a paged
            cache. Decode takes longer (csrc/README.md says why), and dropout is refused.
            Gradients make no such promise.
        backend: ``"auto"``, or a name out of :func:`available_backends`, which never falls back.

    Returns:
        out ``[B, Hq, Sq, Dv]`` (``[B, Sq, Hq, Dv]`` for ``"bshd"``) in q's dtype; with
        ``return_lse`` also the natural-log log-sum-exp of the scaled scores, fp32,
        ``[B, Hq, Sq]`` in either layout; with ``return_aux`` an AuxOutput instead.

    Raises:
        ValueError, TypeError: a malformed argument; the message names it, the rule and the value.
        NotImplementedError: the backend asked for can't run this call; the message says why
            (:func:`explain_backend` says so for every backend).

    Examples:
        >>> import torch
        >>> from gqa_kernels import HeadMap, asym_gqa_attention
        >>> head_map = HeadMap([0, 3, 0, 1, 2])  # 5 query heads over 4 KV heads
        >>> q, k, v = (torch.randn(2, heads, 128, 64) for heads in (5, 4, 4))
        >>> asym_gqa_attention(q, k, v, head_map, causal=True, window=(64, 0)).shape
        torch.Size([2, 5, 128, 64])
    """
    if deterministic is not False:
        as_bool("deterministic", deterministic)
    if return_lse is not False:
        return_lse = as_bool("return_lse", return_lse)
    aux = None if return_aux is None else as_aux_request(return_aux, return_lse)
    call = attention_call(
        q, k, v, head_map, value_head_map, causal, scale, window, softcap, alibi_slopes, sinks,
        attn_mask, kv_lengths, dropout_p, layout, batch_invariant, key_ranges,
    )  # fmt: skip
    call.lse_wanted = return_lse
    if call.options.dropout_p:
        select(call, backend)  # refuses the call before a seed is drawn
        call.draw_dropout_seed()
    if out is not None or lse is not None:
        if aux is not None:
            raise ValueError("out and lse must be None with return_aux, got a tensor")
        return attend_into(call, select(call, backend), out, lse, return_lse, layout)
    if aux is not None:
        out, more = attend_with_auxiliary(call, aux, select(call, backend))
        return out.transpose(1, 2) if call.bshd else out, more
    out, lse = choose(call, backend).run(call)
    if call.bshd:
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


attention_call = AttentionCall.dense  # the call that asym_gqa_attention makes of its arguments
