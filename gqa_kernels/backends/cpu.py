"""CPU backend: the native kernels under ``csrc/cpu``, through one compiled op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd
from ..cache.inputs import AppendInputs, CacheInputs
from ..inputs import AttentionInputs
from ..native import build
from .base import ALL_CACHES, FUSED_OPTIONS, Backend, Capabilities


class CPUBackend(Backend):
    name = "cpu"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=256,
        options=FUSED_OPTIONS,
        autograd=True,
        varlen_autograd=True,
        caches=ALL_CACHES,
    )

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()

    def prepare(self) -> str | None:
        try:
            build.load()
        except RuntimeError as error:
            return str(error)
        return None

    def run(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        return autograd.call(
            torch.ops.gqa_kernels.attention_forward.default,
            inputs.requires_grad,
            inputs.q,
            inputs.k,
            inputs.v,
            _int32(inputs.head_map_tensor),
            _int32(inputs.value_head_map_tensor),
            inputs.alibi_slopes,
            inputs.sinks,
            inputs.attn_mask,
            inputs.kv_lengths,
            inputs.scale,
            inputs.window_left,
            inputs.window_right,
            inputs.softcap,
            inputs.layout == "bshd",
            inputs.dropout_p,
            inputs.dropout_seed,
        )

    def run_cache(self, inputs: CacheInputs) -> tuple[Tensor, Tensor]:
        if inputs.packed_kv is not None and inputs.requires_grad:
            from .varlen_ops import varlen_attention_forward

            return varlen_attention_forward(
                inputs.q,
                inputs.packed_kv.k,
                inputs.packed_kv.v,
                _int32(inputs.head_map_tensor),
                _int32(inputs.value_head_map_tensor),
                inputs.alibi_slopes,
                inputs.sinks,
                inputs.q_offsets,
                inputs.packed_kv.offsets,
                inputs.max_q_len,
                inputs.max_kv_len,
                inputs.scale,
                inputs.window_left,
                inputs.window_right,
                inputs.softcap,
                inputs.layout == "bshd",
            )
        view = inputs.view
        return torch.ops.gqa_kernels.cache_attention_forward.default(
            inputs.q,
            view.k,
            view.v,
            _int32(inputs.head_map_tensor),
            _int32(inputs.value_head_map_tensor),
            inputs.alibi_slopes,
            inputs.sinks,
            inputs.attn_mask,
            view.kv_lengths,
            view.page_table,
            view.kv_begin,
            inputs.q_offsets,
            inputs.max_q_len,
            view.k_scale,
            view.v_scale,
            view.k_zero,
            view.v_zero,
            inputs.scale,
            inputs.window_left,
            inputs.window_right,
            inputs.softcap,
            inputs.layout == "bshd",
            inputs.lse_wanted,
        )

    def append(self, inputs: AppendInputs) -> Tensor | None:
        view, rotates_q = inputs.view, inputs.q is not None and inputs.rotary_cos is not None
        q = torch.ops.gqa_kernels.cache_append.default(
            inputs.q if rotates_q else None,
            inputs.k_new,
            inputs.v_new,
            view.k,
            view.v,
            view.kv_lengths,
            view.page_table,
            view.kv_begin,
            inputs.new_offsets,
            view.k_scale,
            view.v_scale,
            view.k_zero,
            view.v_zero,
            inputs.rotary_cos,
            inputs.rotary_sin,
            inputs.rotary_interleaved,
        )
        return q if rotates_q else inputs.q


def _int32(head_map: Tensor | None) -> Tensor | None:
    if head_map is None or head_map.dtype == torch.int32:
        return head_map
    # An entry beyond 32 bits must stay out of range, not wrap into it.
    return head_map.long().clamp(-1, 2**31 - 1).to(torch.int32)
