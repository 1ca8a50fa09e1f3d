"""From the tensors of a call to kernel launches: values that can be run, compiled or emulated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import common, kv
from .combine import combine_kernel
from .configs import (
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
from .decode import decode_kernel
from .plan import num_groups
from .prefill import prefill_kernel
from .splits import ceil_div

COMBINE_CHUNK = 16  # splits whose partial outputs the combine kernel holds at once


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton's ``kernel[grid](...)`` takes."""

    kernel: object
    grid: int
    arguments: dict[str, Tensor | int | float | None]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        self.kernel[(self.grid,)](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
        )


# Types of quantised storage, as kernels name them. Triton takes fp8 and int4 as bytes.
FORMATS = {
    torch.float8_e4m3fn: kv.FP8_E4M3,
    torch.float8_e5m2: kv.FP8_E5M2,
    torch.int8: kv.INT8,
    torch.uint8: kv.INT4,
}


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
            paged_or_quantised=self.k.dtype in FORMATS
            or (self.cache is not None and self.cache.page_table is not None),
        )

    def forward_arguments(self) -> dict[str, Tensor | int | float | None]:
        """The arguments that the prefill and the decode kernel share."""
        shape, mask, mask_kind = self.shape, self.attn_mask, common.NO_MASK
        cache = self.cache or NO_CACHE
        k, v, format = self.k, self.v, FORMATS.get(self.k.dtype, kv.PLAIN)
        if format in (kv.FP8_E4M3, kv.FP8_E5M2):
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        max_pages = 1 if cache.page_table is None else cache.page_table.shape[2]
        if mask is not None:
            mask_kind = common.ADDITIVE_MASK
            if mask.dtype == torch.bool:
                mask, mask_kind = mask.view(torch.uint8), common.BOOL_MASK
        arguments = {
            "p_q": self.q,
            "p_k": k,
            "p_v": v,
            "p_plan": self.plan,
            "p_slopes": self.alibi_slopes,
            "p_sinks": self.sinks,
            "p_mask": mask,
            "p_lengths": self.kv_lengths,
            "p_seed": self.dropout_seed,
            "p_table": cache.page_table,
            "p_begin": cache.kv_begin,
            "p_q_offsets": cache.q_offsets,
            "p_k_scale": cache.k_scale,
            "p_v_scale": cache.v_scale,
            "p_k_zero": cache.k_zero,
            "p_v_zero": cache.v_zero,
            "p_out": self.out,
            "p_lse": self.lse,
            **strides_of("q", self.q, "bhm"),
            **strides_of("k", k, "bhn"),
            **strides_of("v", v, "bhn"),
            **strides_of("o", self.out, "bhm"),
            **strides_of("slopes_", self.alibi_slopes, "bh"),
            **strides_of("mask_", mask, "bhmn"),
            **strides_of("lengths_", self.kv_lengths, "bh"),
            **strides_of("table_", cache.page_table, "bhp"),
            **strides_of("k_scale_", cache.k_scale, "phn"),
            **strides_of("v_scale_", cache.v_scale, "phn"),
            **strides_of("k_zero_", cache.k_zero, "phn"),
            **strides_of("v_zero_", cache.v_zero, "phn"),
            **strides_of("lse_", self.lse, "bh"),
            "num_heads": shape.num_heads,
            "num_groups": shape.num_groups,
            "q_len": shape.q_len,
            "kv_len": max_pages * self.k.shape[2],
            "num_pages": self.k.shape[0],
            "num_tokens": self.q.shape[2],
            "scale": self.scale,
            "softcap": self.softcap,
            "window_left": shape.window_left,
            "window_right": shape.window_right,
            "dropout_threshold": int(self.dropout_p * 2**32) - 2**31,
            "dropout_scale": 1.0 / (1.0 - self.dropout_p),
            "HEAD_DIM": shape.head_dim,
            "VALUE_DIM": shape.value_head_dim,
            "BLOCK_D": padded_dim(shape.head_dim),
            "BLOCK_DV": padded_dim(shape.value_head_dim),
            "HAS_LEFT": shape.window_left >= 0,
            "HAS_RIGHT": shape.window_right >= 0,
            "HAS_SOFTCAP": self.softcap > 0,
            "HAS_ALIBI": self.alibi_slopes is not None,
            "HAS_SINKS": self.sinks is not None,
            "HAS_LENGTHS": self.kv_lengths is not None,
            "HAS_DROPOUT": self.dropout_seed is not None,
            "MASK_KIND": mask_kind.value,
            "FORMAT": format.value,
            "PAGED": cache.page_table is not None,
            "PAGE_SIZE": self.k.shape[2] if cache.page_table is not None else 1,
        }
        if cache.q_offsets is not None:  # the offsets say where a sequence begins
            arguments |= {"stride_qb": 0, "stride_ob": 0, "stride_lse_b": 0}
        return arguments


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
    arguments = call.forward_arguments() | {
        "num_blocks": num_blocks,
        "heads_per_section": section,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = shape.batch * shape.num_heads * num_blocks
    return Launch(prefill_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def decode_launches(call: ForwardCall, config: DecodeConfig) -> list[Launch]:
    """Launch of the decode kernel and, with more than one split, of the combine kernel."""
    shape, tile = call.shape, config.tile
    num_splits = config.splits.num_splits
    partial = {"p_partial_acc": None, "p_partial_sum": None, "p_partial_max": None}
    if num_splits > 1:
        rows = (shape.batch, shape.num_heads, shape.q_len, num_splits)
        scratch = {"dtype": torch.float32, "device": call.q.device}
        partial["p_partial_acc"] = torch.empty(*rows, shape.value_head_dim, **scratch)
        partial["p_partial_sum"] = torch.empty(rows, **scratch)
        partial["p_partial_max"] = torch.empty(rows, **scratch)
    forward = call.forward_arguments()
    arguments = (
        forward
        | partial
        | {
            "num_tiles": config.num_tiles,
            "num_splits": num_splits,
            "BLOCK_G": power_of_two(shape.num_groups + 1),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "SPLIT": num_splits > 1,
        }
    )
    grid = shape.batch * num_splits * config.num_tiles
    launches = [Launch(decode_kernel, grid, arguments, tile.num_warps, tile.num_stages)]
    if num_splits > 1:
        launches.append(combine_launch(call, partial, num_splits))
    return launches


def combine_launch(call: ForwardCall, partial: dict[str, Tensor], num_splits: int) -> Launch:
    """Launch of the combine kernel over the partial states of the decode kernel."""
    shape = call.shape
    names = ("p_plan", "p_sinks", "p_out", "p_lse", "p_q_offsets", "stride_ob", "stride_oh",
             "stride_om", "stride_lse_b", "stride_lse_h", "num_heads", "num_groups", "q_len",
             "num_tokens", "VALUE_DIM", "BLOCK_DV", "HAS_SINKS")  # fmt: skip
    forward = call.forward_arguments()
    arguments = (
        partial
        | {name: forward[name] for name in names}
        | {
            "num_splits": num_splits,
            "BLOCK_S": power_of_two(num_splits),
            "CHUNK_S": min(COMBINE_CHUNK, power_of_two(num_splits)),
        }
    )
    grid = shape.batch * shape.num_heads * shape.q_len
    return Launch(combine_kernel, grid, arguments, num_warps=4, num_stages=2)


def strides_of(prefix: str, tensor: Tensor | None, dims: str) -> dict[str, int]:
    """``stride_<prefix><dim>`` of the leading dims; zeros where there is no tensor."""
    strides = (0,) * len(dims) if tensor is None else tensor.stride()
    return {f"stride_{prefix}{dim}": stride for dim, stride in zip(dims, strides, strict=False)}
