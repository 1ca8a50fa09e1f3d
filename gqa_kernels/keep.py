"""Keep some of a cache's keys, per (sequence, KV head), and drop the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.dispatch import select
from .cache.base import KVCache
from .call.keep import KeepCall


def keep(
    cache: KVCache, kept: Tensor, lengths: Tensor | None = None, *, backend: str = "auto"
) -> None:
    """Keep the given keys of each sequence, or of each (sequence, KV head), and drop the rest.

    The kept keys and their values become the first ones, in their order: they are moved inside the
    memory that the cache has. This is how a cache is compressed (SnapKV, AdaKV, DuoAttention, ...):
    attention then reads the kept keys only. A head may keep nothing.

    Args:
        kept: positions among the keys there are, int32 or int64 ``[B, n]``, or ``[B, Hk, n]`` for
            other keys in each head: ascending, each once. Or a boolean mask of the same shapes,
            ``n`` positions from the first; keys behind the mask are dropped.
        lengths: ``[B]`` or ``[B, Hk]`` integers, how many entries of each row of ``kept`` count;
            None: all ``n``. None for a mask.
        backend: as in :func:`gqa_kernels.asym_gqa_attention`.

    Afterwards ``cache.lengths`` is a new tensor in the shape of ``lengths``. Layers that shared one
    keep theirs. ``cache.next_positions`` holds the positions that follow: appends rotate new
    tokens by them, not by the length. How far a kept key is from a query is no longer known, so
    attention with a window or ALiBi over this cache is refused. Pages behind the new lengths are
    free: :meth:`gqa_kernels.PageAllocator.keep` returns them.

    Entries in a tensor on an accelerator are not looked at: a wrong one moves nothing or moves a
    wrong key, inside the sequence's own memory.

    Raises:
        ValueError, TypeError: the message names the argument, the rule and the value; nothing was
            moved.
        NotImplementedError: ``[B, Hk, n]`` if key and value heads differ in number; or no
            backend can move keys of this cache.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache
        >>> cache = DenseKVCache.empty(batch=1, num_kv_heads=2, capacity=64, head_dim=16)
        >>> cache.append(*torch.randn(2, 1, 2, 7, 16, dtype=torch.bfloat16))
        >>> scores = torch.rand(1, 2, 7)  # how important each key is
        >>> cache.keep(scores.topk(3, -1).indices.sort(-1).values)  # 3 keys of each head
        >>> cache.lengths.tolist()
        [[3, 3]]
    """
    view = cache.view()
    call, after = KeepCall.create(view, kept, lengths)
    chosen = select(call, backend)
    if cache.next_positions is None and not view.lengths_per_head:
        assert view.kv_lengths is not None  # every cache has them
        cache.next_positions = view.kv_lengths.select(1, 0).clone()
    with torch.no_grad():
        chosen.keep(call)
    cache.lengths = after.clone()
