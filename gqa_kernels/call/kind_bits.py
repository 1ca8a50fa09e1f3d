"""The kind of an attention call: which tensors and which memory it has, as bits of one number.

What runs a call follows from its kind, so a choice is kept for all calls of a kind. What makes a
call sets the bits as it enters the tensors; :func:`find_kind` looks at a whole call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache.view import KIND_BITS
from ..head_map import HeadMap

# Above the bits of KVView.kind.
(
    DEVICE_MAP, VALUE_MAP, VALUE_DEVICE_MAP, SLOPES, SINKS, MASK, ADDITIVE_MASK, MASK_GRADIENT,
    PACKED_QUERIES, DROPOUT_SEED, RANGES, IN_CACHE, IN_PACKED,
) = (1 << bit for bit in range(KIND_BITS, KIND_BITS + 13))  # fmt: skip
MEMORY = {"dense": 0, "cache": IN_CACHE, "packed": IN_PACKED}


def find_kind(call: Any) -> int:
    """A number that is the same for calls with the same kind of memory and the same tensors,
    whatever these hold.

    Args:
        call: an :class:`~gqa_kernels.call.attention.AttentionCall`.
    """
    mask = call.attn_mask
    bits = {
        DEVICE_MAP: type(call.head_map) is not HeadMap,
        VALUE_MAP: call.value_head_map is not None,
        VALUE_DEVICE_MAP: type(call.value_head_map) not in (HeadMap, type(None)),
        SLOPES: call.alibi_slopes is not None,
        SINKS: call.sinks is not None,
        PACKED_QUERIES: call.q_offsets is not None,
        DROPOUT_SEED: call.dropout_seed is not None,
        RANGES: call.key_ranges is not None,
    }
    found = MEMORY[call.memory] | call.kv.kind | (0 if mask is None else mask_kind(mask))
    return found | sum(bit for bit, is_there in bits.items() if is_there)


def mask_kind(mask: Tensor) -> int:
    """The bits of a mask."""
    kind = MASK if mask.dtype == torch.bool else MASK | ADDITIVE_MASK
    return kind | MASK_GRADIENT if mask.requires_grad else kind
