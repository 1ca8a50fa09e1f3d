"""Why each backend can or can't run a call."""

from __future__ import annotations

from .backends.dispatch import explain
from .cache.base import KVCache
from .cache.decode import decode_inputs
from .inputs import AttentionInputs
from .varlen import varlen_inputs


def explain_backend(q, *call, **options) -> dict[str, list[str]]:
    """Why each backend can't run a call.

    Args:
        q, call, options: as one of these takes them (without ``backend`` and ``return_lse``):
            ``(q, k, v, head_map)`` of :func:`gqa_kernels.asym_gqa_attention`, ``(q, cache,
            head_map)`` of :func:`gqa_kernels.asym_gqa_decode`, or ``(q, k, v, head_map,
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)`` of
            :func:`gqa_kernels.asym_gqa_varlen_attention`.

    Returns:
        For every backend the list of reasons against it, in the order in which ``"auto"`` tries
        them: it takes the first whose list is empty.
    """
    if call and isinstance(call[0], KVCache):
        return explain(decode_inputs(q, *call, **options))
    if len(call) > 3 or "cu_seqlens_q" in options:
        return explain(varlen_inputs(q, *call, **options))
    return explain(AttentionInputs.create(q, *call, **options))
