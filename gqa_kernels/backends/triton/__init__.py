"""Triton backend: attention and its gradients on NVIDIA and AMD GPUs, or in Triton's interpreter.

    ops.py          the torch ops
    launch.py       tensors of a call -> kernel launches
    configs.py      tiles and launch choices: data and pure functions
    prefill.py      kernel for many query tokens, one head per tile
    decode.py       kernel for few query tokens, a group's heads packed into one tile, split keys
    combine.py      merge of the splits
    backward_*.py   kernels of the gradients, and their launches
    varlen_ops.py   the ops of packed sequences that have gradients
    dropout.py      which probabilities dropout keeps
    common.py       the formula: scores, masking, online softmax
    kv.py           where keys and values lie: dense or paged, and what stored numbers mean
    append.py       kernel that writes new tokens into a cache, rotated and quantised
    cache_launch.py tensors of an append -> its launch
    interpreter.py  mends the interpreter's bf16

Nothing here imports triton until the backend first runs.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ...cache.inputs import AppendInputs, CacheInputs
from ...inputs import AttentionInputs
from ...native import env
from ...plan import plan_for
from ..base import ALL_CACHES, FUSED_OPTIONS, Backend, Capabilities

MIN_CUDA_CAPABILITY = (8, 0)


class TritonBackend(Backend):
    name = "triton"
    capabilities = Capabilities(
        devices=frozenset({"cuda", "cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=256,
        options=FUSED_OPTIONS,
        autograd=True,
        varlen_autograd=True,
        caches=ALL_CACHES,
    )

    def unavailable_reason(self) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        if env.triton_interpreter():
            return None
        if not torch.cuda.is_available():
            return "no CUDA or ROCm device; set TRITON_INTERPRET=1 to run on the CPU (slow)"
        capability = torch.cuda.get_device_capability()
        if not torch.version.hip and capability < MIN_CUDA_CAPABILITY:
            return f"compute capability must be at least {MIN_CUDA_CAPABILITY}, got {capability}"
        return None

    def unsupported_reasons(self, inputs: AttentionInputs) -> list[str]:
        return super().unsupported_reasons(inputs) + _device_reasons(inputs.device)

    def unsupported_cache_reasons(self, inputs: CacheInputs | AppendInputs) -> list[str]:
        return super().unsupported_cache_reasons(inputs) + _device_reasons(inputs.device)

    def run(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        from . import backward_ops  # noqa: F401  (registers the autograd)
        from .ops import triton_attention_forward

        return triton_attention_forward(
            inputs.q,
            inputs.k,
            inputs.v,
            plan_for(inputs),
            inputs.value_head_map_tensor,
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
            from .varlen_ops import triton_varlen_forward

            return triton_varlen_forward(
                inputs.q,
                inputs.packed_kv.k,
                inputs.packed_kv.v,
                plan_for(inputs),
                inputs.value_head_map_tensor,
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
        from .ops import triton_cache_attention_forward

        view = inputs.view
        return triton_cache_attention_forward(
            inputs.q,
            view.k,
            view.v,
            plan_for(inputs),
            inputs.alibi_slopes,
            inputs.sinks,
            inputs.attn_mask,
            view.kv_lengths,
            view.page_table,
            view.kv_begin,
            inputs.q_offsets,
            inputs.max_q_len,
            inputs.max_kv_len,
            view.k_scale,
            view.v_scale,
            view.k_zero,
            view.v_zero,
            inputs.scale,
            inputs.window_left,
            inputs.window_right,
            inputs.softcap,
            inputs.layout == "bshd",
        )

    def append(self, inputs: AppendInputs) -> Tensor | None:
        from .ops import triton_cache_append

        view, rotates_q = inputs.view, inputs.q is not None and inputs.rotary_cos is not None
        rotated = triton_cache_append(
            inputs.q if rotates_q else None,
            inputs.k_new,
            inputs.v_new,
            view.k,
            view.v,
            view.kv_lengths,
            view.page_table,
            view.kv_begin,
            inputs.new_offsets,
            inputs.max_new,
            view.k_scale,
            view.v_scale,
            view.k_zero,
            view.v_zero,
            inputs.rotary_cos,
            inputs.rotary_sin,
            inputs.rotary_interleaved,
        )
        return rotated if rotates_q else inputs.q


def _device_reasons(device: torch.device) -> list[str]:
    if device.type == "cpu" and not env.triton_interpreter():
        return ["device cpu (only with TRITON_INTERPRET=1)"]
    return []
