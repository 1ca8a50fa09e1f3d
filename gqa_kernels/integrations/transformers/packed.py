"""Attention of packed sequences, without a mask, and of transformers' continuous batching."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import asym_gqa_attention
from ...varlen import asym_gqa_varlen_attention
from .call import attention_call
from .masks import SequenceMask, has_values, row_offsets
from .versions import BATCHING


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | SequenceMask | None,
    backend: str,
    **options: Any,
) -> Tensor | None:
    """Attention inside each of several sequences, as ``AttentionInterface`` calls it.

    Args:
        module: the attention layer.
        query: ``[B, Hq, S, D]``; its rows are concatenated.
        key, value: ``[B, Hkv, Sk, D]``, likewise.
        attention_mask: None, or a SequenceMask, which has the offsets of the sequences.
        options: of the interface. The offsets are the first of these that is given: flash
            attention's ``cu_seq_lens_q`` ``[n + 1]`` (with ``cu_seq_lens_k`` if those of the keys
            differ, and the longest sequences in ``max_length_q`` and ``max_length_k``), the mask's,
            those that ``position_ids`` ``[1, S]`` imply by starting over.

    Returns:
        ``[B, S, Hq, Dv]``; None if the call has no offsets, or needs a dense mask: one of its own,
        dropout, a position bias.
    """
    window = options.pop("sliding_window", None)
    begins_q, begins_k = options.pop("cu_seq_lens_q", None), options.pop("cu_seq_lens_k", None)
    longest_q, longest_k = options.pop("max_length_q", None), options.pop("max_length_k", None)
    causal = options.pop("is_causal", None)
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if isinstance(attention_mask, SequenceMask):
        window, causal = attention_mask.window, True
        if begins_q is None and attention_mask.offsets is not None:
            begins_q, longest_q = attention_mask.offsets, attention_mask.longest
    elif attention_mask is not None:
        return None
    if begins_k is None:
        if key.shape[2] != query.shape[2]:
            return None
        told = begins_q is not None
        if not told and causal and query.shape[0] == 1:
            begins_q = _last.offsets(options.get("position_ids"), query.shape[2])
        if begins_q is not None and not told and options.get("dropout"):
            call = attention_call(
                module, query, key, value, None, is_causal=True, sliding_window=window,
                cu_seq_lens_q=begins_q, **options,
            )  # fmt: skip
            return asym_gqa_attention(**call, backend=backend)
        begins_k, longest_k = begins_q, longest_q
    if begins_q is None or options.get("dropout") or options.get("position_bias") is not None:
        return None
    call = attention_call(module, query, key, value, None, is_causal=False, **options)
    for name in ("attn_mask", "dropout_p", "layout"):
        del call[name]
    call.update(causal=causal, window=None if window is None else (window - 1, None))
    rows = (call.pop(name).flatten(0, 1) for name in "qkv")  # [B * S, H, D], views where B is 1
    out = asym_gqa_varlen_attention(
        *rows, call.pop("head_map"), begins_q, begins_k,
        _longest(longest_q, begins_q, query.shape[2]), _longest(longest_k, begins_k, key.shape[2]),
        **call, backend=backend,
    )  # fmt: skip
    return out.unflatten(0, (query.shape[0], query.shape[2]))


class _LastPositions:
    """Offsets of the sequences in the last position ids, which all layers of a model share.

    Some models (GPT-OSS) pass positions to their layers without using them in the mask.
    """

    def __init__(self) -> None:
        # One tuple, (positions, their version, offsets), for threads of other models to replace.
        self.last: tuple[Any, ...] = (lambda: None, None, None)

    def offsets(self, positions: Tensor | None, tokens: int) -> Tensor | None:
        """``[n + 1]``, if positions ``[1, tokens]`` start over, and rise by one elsewhere."""
        if positions is None or positions.shape != (1, tokens) or not has_values(positions):
            return None
        if positions.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # looking at them would break the graph
        version = None if positions.is_inference() else positions._version
        last, last_version, found = self.last
        if version is not None and last() is positions and last_version == version:
            return found  # not of inference tensors, which have no version
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions.diff() != 1
        first = positions[begins]
        packed = len(first) > 1 and bool((first == first[0]).all())
        found = row_offsets(begins) if packed else None
        self.last = (weakref.ref(positions), version, found)
        return found


_last = _LastPositions()


def _longest(given: int | Tensor | None, begins: Tensor, tokens: int) -> int:
    """Most tokens of a sequence; without values to look at, at most all of a row."""
    if given is None:
        given = begins.diff().max() if has_values(begins) else tokens
    return int(given)


def refuse_block_table(options: dict[str, Any]) -> None:
    """Raise NotImplementedError if continuous batching left keys to be read through a table."""
    if options.get("block_table") is not None:
        raise NotImplementedError(
            "block_table must be None in continuous batching: set max_blocks_per_request=0 in the "
            "ContinuousBatchingConfig"
        )


def batched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, backend: str, **options: Any
) -> Tensor:
    """A layer's step in continuous batching before transformers 5.24: store the new keys, attend.

    From 5.24 on the model itself stores them, and the call is one of packed sequences.

    Args:
        module: the attention layer.
        query: ``[1, Hq, T, D]``, new tokens of all requests; key and value likewise.
        options: of the interface, with transformers' ``cache`` and the requests' places in it. A
            mask among them is ignored: it says the same as the lengths.

    Returns:
        ``[1, T, Hq, Dv]``.

    Raises:
        NotImplementedError: the cache is not that of continuous batching.
    """
    cache = options.pop("cache")
    if not _is_batching_cache(cache):
        raise NotImplementedError(
            f"{type(module).__name__}.forward must use the cache that it is passed, got a "
            f"{type(cache).__name__} left to the attention function: the module was written for "
            "another release of transformers, or continuous batching is older than transformers "
            f"{BATCHING}"
        )
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options
    )
    for name in ("read_index", "write_index", "block_table"):
        options.pop(name, None)
    return packed_attention(module, query, key, value, None, backend, **options)


def _is_batching_cache(cache: object) -> bool:
    """Whether it is continuous batching's cache: other caches also have an ``update``."""
    from transformers.cache_utils import Cache

    update = getattr(cache, "update", None)
    takes = () if update is None else inspect.signature(update).parameters
    return not isinstance(cache, Cache) and "kwargs" in takes
