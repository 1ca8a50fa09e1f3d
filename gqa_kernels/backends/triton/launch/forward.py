"""From the tensors of a forward call to its launches: prefill, or decode and combine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..configs import (
    DecodeConfig,
    DeviceFacts,
    Shape,
    Tile,
    decode_config,
    heads_per_section,
    padded_dim,
    power_of_two,
    prefers_decode,
    prefill_tile,
)
from ..kernels.arguments import Partial
from ..kernels.combine import combine_kernel
from ..kernels.decode import decode_kernel
from ..kernels.prefill import prefill_kernel
from ..plan import num_groups
from ..splits import ceil_div
from .base import FORMATS, Argument, Launch, dims_of, mask_of, pages_of, per_head, rows_of, stored

COMBINE_CHUNK = 16  # splits whose partial outputs the combine kernel holds at once, at most
COMBINE_ELEMENTS = 16 * 256  # of these outputs, likewise


@dataclass(frozen=True)
class CacheCall:
    """What a call over a KV view has besides; see :class:`~gqa_kernels.cache.view.KVView`."""

    page_table: Tensor | None  # int32 [B, Hk, max_pages]
    kv_begin: Tensor | None  # int32 [B]
    q_offsets: Tensor | None  # int32 [B + 1]
    max_q_len: int
    max_kv_len: int
    k_scale: Tensor | None  # fp32 [P, Hk, page_size]; those below likewise
    v_scale: Tensor | None
    k_zero: Tensor | None
    v_zero: Tensor | None


NO_CACHE = CacheCall(None, None, None, 0, 0, None, None, None, None)


@dataclass(frozen=True)
class ForwardCall:
    """Tensors and options of one forward call, as the custom ops take them, with its outputs.

    With ``cache``, k and v are the storage of a KV view, and where that has ``q_offsets``, q, out
    and lse are ``[1, Hq, tokens, ...]``.
    """

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hk, Sk, D]
    v: Tensor  # [B, Hv, Sk, Dv]
    plan: Tensor  # int32 [3 * Hq + G + 2]
    alibi_slopes: Tensor | None  # fp32 [B, Hq]
    sinks: Tensor | None  # fp32 [Hq]
    attn_mask: Tensor | None  # bool or floating [B, Hq, Sq, Sk]
    kv_lengths: Tensor | None  # int32 [B, Hk]
    scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    dropout_seed: Tensor | None  # int64 [2]
    out: Tensor  # [B, Hq, Sq, Dv]
    lse: Tensor  # fp32 [B, Hq, Sq], contiguous
    cache: CacheCall | None = None
    row_max: Tensor | None = None  # fp32 as lse, or None: the largest score of each row

    @property
    def log2_scale(self) -> float | None:
        """``scale * log2(e)`` if kernels may leave the scale to the exponent, which saves a
        multiplication per score: nothing else changes the scores, and the largest q . k of a row
        is its largest score. fp32 keeps the scores themselves: there the rounding of the product
        shows."""
        mask = self.attn_mask
        alone = self.softcap <= 0 and self.alibi_slopes is None
        alone = alone and (mask is None or mask.dtype == torch.bool)
        folds = alone and self.scale > 0 and self.q.dtype != torch.float32
        return self.scale * math.log2(math.e) if folds else None

    @cached_property
    def shape(self) -> Shape:
        batch, heads, q_len, head_dim = self.q.shape
        kv_len, value_head_dim = self.k.shape[2], self.v.shape[3]
        if self.cache is not None:
            batch = self.kv_lengths.shape[0]
            q_len, kv_len = self.cache.max_q_len, self.cache.max_kv_len
            value_head_dim = self.out.shape[3]
        # A side that reaches past every key from every query is no limit: no masking for it.
        bounded_left = 0 <= self.window_left < kv_len
        bounded_right = 0 <= self.window_right < q_len - 1
        return Shape(
            batch=batch,
            num_heads=heads,
            num_groups=num_groups(self.plan, heads),
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            itemsize=self.q.element_size(),
            modifies_scores=(
                self.softcap > 0
                or self.alibi_slopes is not None
                or self.attn_mask is not None
                or self.dropout_seed is not None
            ),
            window_left=self.window_left if bounded_left else -1,
            window_right=self.window_right if bounded_right else -1,
            has_lengths=self.kv_lengths is not None,
            paged_or_quantised=self.k.dtype in FORMATS
            or (self.cache is not None and self.cache.page_table is not None),
        )

    def arguments(self) -> dict[str, Argument]:
        """The arguments that several kernels share; each launch takes those that it needs."""
        shape, cache = self.shape, self.cache or NO_CACHE
        packed = cache.q_offsets is not None
        max_pages = 1 if cache.page_table is None else cache.page_table.shape[2]
        drops = self.dropout_seed is not None
        return {
            "q": rows_of(self.q, packed),
            "keys": stored(self.k, cache.k_scale, cache.k_zero),
            "values": stored(self.v, cache.v_scale, cache.v_zero),
            "out": rows_of(self.out, packed),
            "p_lse": self.lse,
            "p_row_max": self.row_max,
            "p_plan": self.plan,
            "slopes": per_head(self.alibi_slopes),
            "p_sinks": self.sinks,
            "mask": mask_of(self.attn_mask),
            "lengths": per_head(self.kv_lengths),
            "pages": pages_of(cache.page_table, self.k.shape[2]),
            "p_begin": cache.kv_begin,
            "p_q_offsets": cache.q_offsets,
            "p_seed": self.dropout_seed,
            "num_heads": shape.num_heads,
            "num_groups": shape.num_groups,
            "q_len": shape.q_len,
            "kv_len": max_pages * self.k.shape[2],
            "num_tokens": self.q.shape[2],
            "num_pages": self.k.shape[0],
            "scale": self.scale,
            "log2_scale": self.log2_scale,
            "softcap": self.softcap if self.softcap > 0 else None,
            "window_left": shape.window_left if shape.window_left >= 0 else None,
            "window_right": shape.window_right if shape.window_right >= 0 else None,
            "dropout_threshold": int(self.dropout_p * 2**32) - 2**31 if drops else None,
            "dropout_scale": 1.0 / (1.0 - self.dropout_p),
            "DIMS": dims_of(shape.head_dim, shape.value_head_dim),
        }


def forward_launches(call: ForwardCall, facts: DeviceFacts) -> list[Launch]:
    """The launches of a call, in order; none where there is nothing to write."""
    if call.lse.numel() == 0:
        return []
    if prefers_decode(call.shape, facts):
        return decode_launches(call, decode_config(call.shape, facts))
    section = heads_per_section(call.shape, facts)
    return [prefill_launch(call, prefill_tile(call.shape, facts), section)]


def prefill_launch(call: ForwardCall, tile: Tile, section: int) -> Launch:
    """Launch of the prefill kernel, ``section`` query heads side by side."""
    shape = call.shape
    num_blocks = ceil_div(shape.q_len, tile.block_m)
    arguments = call.arguments() | {
        "num_blocks": num_blocks,
        "heads_per_section": section,
        "DIMS": dims_of(shape.head_dim, shape.value_head_dim, tile),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = shape.batch * shape.num_heads * num_blocks * tile.value_slices(shape)
    return Launch.of(prefill_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def decode_launches(call: ForwardCall, config: DecodeConfig) -> list[Launch]:
    """Launch of the decode kernel and, with more than one split, of the combine kernel."""
    shape, tile = call.shape, config.tile
    num_splits, parts = config.splits.num_splits, config.parts
    num_parts = shape.batch * num_splits if parts is None else parts.most_parts
    partial, p_parts = None, None
    if num_splits > 1 or parts is not None:
        rows = (num_parts, shape.num_heads, shape.q_len)
        scratch = {"dtype": torch.float32, "device": call.q.device}
        if parts is not None:
            p_parts = call.q.new_empty(shape.batch, 2, dtype=torch.int32)
        partial = Partial(
            torch.empty(*rows, shape.value_head_dim, **scratch),
            torch.empty(rows, **scratch),
            torch.empty(rows, **scratch),
        )
    arguments = call.arguments() | {
        "partial": partial,
        "p_parts": p_parts,
        "batch": shape.batch,
        "num_lengths": _num_lengths(call.kv_lengths),
        "even_parts": 1 if parts is None else parts.even_parts,
        "most_blocks": 1 if parts is None else parts.most_blocks,
        "num_tiles": config.num_tiles,
        "num_splits": num_splits,
        "BLOCK_G": power_of_two(shape.num_groups + 1),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CHUNK_S": min(COMBINE_CHUNK, COMBINE_ELEMENTS // padded_dim(shape.value_head_dim)),
    }
    of_tile = {"DIMS": dims_of(shape.head_dim, shape.value_head_dim, tile)}
    grid = num_parts * config.num_tiles * tile.value_slices(shape)
    launches = [
        Launch.of(decode_kernel, grid, arguments | of_tile, tile.num_warps, tile.num_stages)
    ]
    if partial is not None:
        num_rows = shape.batch * shape.num_heads * shape.q_len
        launches.append(Launch.of(combine_kernel, num_rows, arguments, 4, 2))
    return launches


def _num_lengths(kv_lengths: Tensor | None) -> int:
    """KV heads whose lengths may differ."""
    if kv_lengths is None or kv_lengths.stride(1) == 0:
        return 1
    return kv_lengths.shape[1]
