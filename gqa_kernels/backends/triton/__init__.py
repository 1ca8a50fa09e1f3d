"""Triton backend: forward attention on NVIDIA and AMD GPUs, or anywhere in Triton's interpreter.

    ops.py          the torch op
    launch.py       tensors of a call -> kernel launches
    configs.py      tiles and launch choices: data and pure functions
    prefill.py      kernel for many query tokens, one head per tile
    decode.py       kernel for few query tokens, a group's heads packed into one tile, split keys
    combine.py      merge of the splits
    common.py       the formula: scores, masking, online softmax
    interpreter.py  mends the interpreter's bf16

Nothing here imports triton until the backend first runs.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ... import env
from ...inputs import AttentionInputs
from ...plan import plan_for
from ..base import FUSED_OPTIONS, Backend, Capabilities

MIN_CUDA_CAPABILITY = (8, 0)


class TritonBackend(Backend):
    name = "triton"
    capabilities = Capabilities(
        devices=frozenset({"cuda", "cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=256,
        options=FUSED_OPTIONS - {"dropout"},
        autograd=False,
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
        reasons = super().unsupported_reasons(inputs)
        if inputs.device.type == "cpu" and not env.triton_interpreter():
            reasons.append("device cpu (only with TRITON_INTERPRET=1)")
        return reasons

    def run(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        from .ops import triton_attention_forward

        return triton_attention_forward(
            inputs.q,
            inputs.k,
            inputs.v,
            plan_for(inputs),
            inputs.alibi_slopes,
            inputs.sinks,
            inputs.attn_mask,
            inputs.kv_lengths,
            inputs.scale,
            inputs.window_left,
            inputs.window_right,
            inputs.softcap,
            inputs.layout == "bshd",
        )
