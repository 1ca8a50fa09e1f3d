"""asym_gqa_varlen_attention: sequences of different lengths packed behind each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .backends.dispatch import choose, select
from .backends.into import attend_into
from .call.attention import AttentionCall
from .call.causality import causal_ranges
from .call.checks import HeadMapLike
from .call.keywords import PackedKeywords
from .call.options import Options
from .native.arguments import as_bool
from .native.autograd import autocast

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def asym_gqa_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    return_lse: Literal[False] = False,
    **keywords: Unpack[PackedKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def asym_gqa_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    return_lse: Literal[True],
    **keywords: Unpack[PackedKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def asym_gqa_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    return_lse: bool,
    **keywords: Unpack[PackedKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def asym_gqa_varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: HeadMapLike,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    value_head_map: HeadMapLike | None = None,
    causal: bool | Tensor = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_ranges: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gqa_kernels.asym_gqa_attention` of each of ``B`` packed sequences, differentiable and
    under autocast as that is. NaN and infinities at hidden keys act as they do there; tokens of
    other sequences, or of none, never matter to a sequence.

    Args:
        q: ``[total_q, Hq, D]``.
        k: ``[total_k, Hk, D]``, q's dtype and device.
        v: ``[total_k, Hv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` integers ascending from 0: sequence ``b`` has the
            queries ``cu_seqlens_q[b]`` up to ``cu_seqlens_q[b + 1]``, and keys likewise. On an
            accelerator they are read there, without synchronisation.
        max_seqlen_q, max_seqlen_k: most queries and keys of a sequence: sizes of grids.
        causal: a bool, or a bool tensor ``[B]`` for each sequence, which takes a backend with
            ``key_ranges``.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.
        attn_mask: broadcastable to ``[B, Hq, max_seqlen_q, max_seqlen_k]``; queries and keys are
            counted in their sequence. On the CPU and in the reference.
        key_ranges: ``[B, 1 or Hq, max_seqlen_q, 2]``, as for ``asym_gqa_attention``; queries and
            keys are counted in their sequence.
        dropout_p: as for ``asym_gqa_attention``, and refused under the same conditions. On the CPU
            and in the reference.
        head_map, value_head_map, scale, window, softcap, sinks, return_lse, out, lse, \
        deterministic, batch_invariant, backend: as for ``asym_gqa_attention``.

    Returns:
        out ``[total_q, Hq, Dv]`` in q's dtype; with ``return_lse`` also the LSE, fp32
        ``[Hq, total_q]``. The output at tokens of no sequence is unspecified; gradients of such
        tokens are zeros.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``asym_gqa_attention``.

    Examples:
        >>> import torch
        >>> from gqa_kernels import asym_gqa_varlen_attention
        >>> offsets = torch.tensor([0, 5, 12])  # two sequences, of 5 and 7 tokens
        >>> q, k, v = (torch.randn(12, heads, 64) for heads in (3, 2, 2))
        >>> out = asym_gqa_varlen_attention(q, k, v, [0, 0, 1], offsets, offsets, 7, 7, causal=True)
        >>> out.shape
        torch.Size([12, 3, 64])
    """
    as_bool("deterministic", deterministic)
    return_lse = as_bool("return_lse", return_lse)
    call = varlen_call(
        q, k, v, head_map, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
        window, softcap, batch_invariant, dropout_p, key_ranges, value_head_map=value_head_map,
        alibi_slopes=alibi_slopes, sinks=sinks, attn_mask=attn_mask,
    )  # fmt: skip
    call.lse_wanted = return_lse
    if call.options.dropout_p:
        select(call, backend)  # refuses the call before a seed is drawn
        call.draw_dropout_seed()
    if out is not None or lse is not None:
        return attend_into(call, select(call, backend), out, lse, return_lse)
    out, lse = choose(call, backend).run(call)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def varlen_call(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool | Tensor = False,
    scale: float | None = None, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, batch_invariant: bool = False, dropout_p: float = 0.0,
    key_ranges: Tensor | None = None, **tensors: Any,
) -> AttentionCall:  # fmt: skip
    """The call that :func:`asym_gqa_varlen_attention` makes of its arguments."""
    if isinstance(causal, Tensor):
        key_ranges = causal_ranges(causal, q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, key_ranges)
        causal = False
    options = Options.of(causal, scale, window, softcap, dropout_p, batch_invariant)
    return AttentionCall.packed(
        *autocast(q, k, v), head_map, options, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, key_ranges=key_ranges, **tensors,
    )  # fmt: skip
