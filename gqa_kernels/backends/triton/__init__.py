"""Triton backend: attention and its gradients on NVIDIA and AMD GPUs, or in Triton's interpreter.

    ops.py          the torch ops, with fake kernels and autograd
    plan.py         the device plan of a head map
    splits.py       how the keys of a sequence are split, or those of a batch by its lengths
    launch.py       tensors of a call -> kernel launches
    configs.py      tiles and launch choices: data and pure functions
    prefill.py      kernel for many query tokens, one head per tile
    decode.py       kernel for few query tokens, a group's heads packed into one tile, split keys
    parts.py        which part of which sequence a decode program has
    combine.py      merge of the splits
    backward_*.py   kernels of the gradients, and their launches
    dropout.py      which probabilities dropout keeps
    common.py       the formula: scores, masking, online softmax
    kv.py           where keys and values lie: dense or paged, and what stored numbers mean
    append.py       kernel that writes new tokens into a cache, rotated and quantised
    key_scores.py   kernel that sums the attention that each key gets from the last queries
    keep.py         kernel that moves the keys that a cache keeps to the front
    cache_launch.py tensors of an append -> its launch
    interpreter.py  corrects the interpreter's bf16

Nothing here imports triton until the backend first runs.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ...call.append import AppendCall
from ...call.attention import AttentionCall
from ...call.auxiliary import AuxOutput, AuxRequest
from ...call.keep import KeepCall
from ...native import env
from ...native.autograd import is_transformed_now
from ...native.flops import enter_formulas
from ...native.schema import APPEND, FORWARD, KEEP
from ..base import ALL_CACHES, FUSED_OPTIONS, Backend, Call, Capabilities
from .plan import plan_for

MIN_CUDA_CAPABILITY = (8, 0)


class TritonBackend(Backend):
    name = "triton"
    capabilities = Capabilities(
        devices=frozenset({"cuda", "cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=576,
        options=FUSED_OPTIONS | {"varlen_mask"},
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

    def unsupported(self, call: Call) -> list[str]:
        reasons = super().unsupported(call)
        if call.device.type == "cpu" and not env.triton_interpreter():
            reasons.append("device cpu (only with TRITON_INTERPRET=1)")
        return reasons

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        from .ops import triton_attention_forward

        return triton_attention_forward(**self._arguments(call))

    def attend_into(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        if not self.fuses_auxiliary(call):
            return super().attend_into(call, out, lse)
        from .ops import triton_attention_into

        triton_attention_into(**self._arguments(call), out=out, lse=lse)

    def _arguments(self, call: AttentionCall) -> dict[str, object]:
        """The arguments of a checked call, by name."""
        call.check()
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            enter_formulas()
        named = dict(zip(FORWARD.names, FORWARD.arguments_of(call), strict=True))
        del named["head_map"]
        return {"plan": plan_for(call), **named}

    def fuses_auxiliary(self, call: AttentionCall) -> bool:
        return type(call.q) is Tensor and not call.requires_grad and not is_transformed_now()

    def attend_with_auxiliary(
        self, call: AttentionCall, request: AuxRequest
    ) -> tuple[Tensor, AuxOutput]:
        from .ops import triton_attention_auxiliary

        out, *results = triton_attention_auxiliary(
            **self._arguments(call),
            max_scores=request.max_scores,
            key_scores=request.key_scores,
        )
        return out, request.output(*results)

    def append(self, call: AppendCall) -> Tensor | None:
        from .ops import triton_cache_append

        call.check()
        rotated = triton_cache_append(*APPEND.arguments_of(call))
        return call.q if call.rotated_q is None else rotated

    def keep(self, call: KeepCall) -> None:
        from .ops import triton_cache_keep

        triton_cache_keep(*KEEP.arguments_of(call))
