"""Keyword arguments of the public functions, for their overloads over ``return_lse``.

They exist for type checkers. A function's own signature says what it takes, with defaults;
``tests/api/test_types.py`` compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from ..cache.tensors import Layout
from .checks import HeadMapLike


class PartKeywords(TypedDict, total=False):
    """Of attention over any part of the keys."""

    value_head_map: HeadMapLike | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    backend: str


class ResultKeywords(TypedDict, total=False):
    """Memory of the caller's for results."""

    out: Tensor | None
    lse: Tensor | None


class CommonKeywords(PartKeywords, ResultKeywords, total=False):
    """Of all functions over whole sequences."""

    window: tuple[int | None, int | None] | None
    alibi_slopes: Tensor | None
    attn_mask: Tensor | None
    key_ranges: Tensor | None
    deterministic: bool
    batch_invariant: bool


class PackedKeywords(CommonKeywords, total=False):
    """Of :func:`gqa_kernels.asym_gqa_varlen_attention`."""

    causal: bool | Tensor
    dropout_p: float


class AttentionKeywords(CommonKeywords, total=False):
    """Of :func:`gqa_kernels.asym_gqa_attention`."""

    causal: bool
    kv_lengths: Tensor | Sequence[int] | None
    dropout_p: float
    layout: Layout


class RotaryKeywords(TypedDict, total=False):
    """Of a rotary embedding."""

    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    rotary_positions: Tensor | None


class StepKeywords(RotaryKeywords, ResultKeywords, total=False):
    """Of a :class:`gqa_kernels.decode.DecodePlan`."""


class DecodeKeywords(CommonKeywords, RotaryKeywords, total=False):
    """Of :func:`gqa_kernels.asym_gqa_decode`."""

    causal: bool
    k_new: Tensor | None
    v_new: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    layout: Layout
    advance: bool
