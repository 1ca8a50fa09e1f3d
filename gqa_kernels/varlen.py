"""asym_gqa_varlen_attention: sequences of different lengths packed behind each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import autocast
from .backends.dispatch import select
from .cache.inputs import CacheInputs, PackedKV, resolve_offsets, to_heads_first
from .cache.view import KVView
from .inputs import HeadMapLike


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
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gqa_kernels.asym_gqa_attention` of each of ``B`` packed sequences, differentiable and
    under autocast as that is.

    Args:
        q: ``[total_q, Hq, D]``.
        k: ``[total_k, Hk, D]``, q's dtype and device.
        v: ``[total_k, Hv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` integers ascending from 0: sequence ``b`` has the
            queries ``cu_seqlens_q[b]`` up to ``cu_seqlens_q[b + 1]``, and keys likewise. On an
            accelerator they are read there, without synchronisation.
        max_seqlen_q, max_seqlen_k: most queries and keys of a sequence: sizes of grids.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.
        head_map, value_head_map, causal, scale, window, softcap, sinks, return_lse, deterministic,
        backend: as for ``asym_gqa_attention``.

    Returns:
        out ``[total_q, Hq, Dv]`` in q's dtype; with ``return_lse`` also the LSE, fp32
        ``[Hq, total_q]``. What stands at tokens of no sequence is unspecified; gradients of such
        tokens are zeros.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``asym_gqa_attention``.
    """
    inputs = varlen_inputs(
        q, k, v, head_map, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        value_head_map=value_head_map, causal=causal, scale=scale, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, deterministic=deterministic,
    )  # fmt: skip
    out, lse = select(inputs, backend).run_cache(inputs)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def varlen_inputs(
    q: Tensor, k: Tensor, v: Tensor, head_map: HeadMapLike, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *, causal: bool = False, **options,
) -> CacheInputs:  # fmt: skip
    """The checked call: storage that every sequence sees, and where each sequence begins in it."""
    q, k, v = autocast(q, k, v)
    k, _ = to_heads_first("k", k, "bhsd", True)
    v, _ = to_heads_first("v", v, "bhsd", True)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"v.shape[0] must equal k.shape[0] ({k.shape[2]}), got {v.shape[2]}")
    batch = cu_seqlens_k.shape[0] - 1 if isinstance(cu_seqlens_k, Tensor) else 0
    offsets, max_seqlen_k = resolve_offsets(
        "cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k, batch
    )
    if k.shape[2] == 0:  # a view has at least one slot
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return CacheInputs.create(
        q, KVView.packed(k, v, offsets), head_map, packed_kv=PackedKV(k, v, offsets),
        q_offsets=cu_seqlens_q, max_q_len=max_seqlen_q, max_kv_len=max_seqlen_k, causal=causal,
        **options,
    )  # fmt: skip
