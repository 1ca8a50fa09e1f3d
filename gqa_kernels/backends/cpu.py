"""CPU backend: the native kernels under ``csrc/cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.attention import AttentionCall
from ..call.auxiliary import AuxOutput, AuxRequest
from ..native import build
from ..native.autograd import is_transformed_now
from ..native.flops import enter_formulas
from ..native.schema import FORWARD
from .base import ALL_CACHES, FUSED_OPTIONS, Capabilities
from .compiled import CompiledBackend


class CPUBackend(CompiledBackend):
    name = part = "cpu"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=576,
        options=FUSED_OPTIONS | {"batch_invariant", "varlen_mask", "varlen_dropout", "key_ranges"},
        autograd=True,
        varlen_autograd=True,
        caches=ALL_CACHES,
    )

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()

    def attend_into(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        if not self.fuses_auxiliary(call):
            return super().attend_into(call, out, lse)
        op = torch.ops.gqa_kernels.attention_into.default
        if torch._C._len_torch_dispatch_stack():
            enter_formulas()
        try:
            op(*FORWARD.arguments_of(call), out, lse)
        except RuntimeError:
            call.check()
            raise

    def fuses_auxiliary(self, call: AttentionCall) -> bool:
        return type(call.q) is Tensor and not call.requires_grad and not is_transformed_now()

    def attend_with_auxiliary(
        self, call: AttentionCall, request: AuxRequest
    ) -> tuple[Tensor, AuxOutput]:
        arguments = (*FORWARD.arguments_of(call), request.max_scores, request.key_scores)
        op = torch.ops.gqa_kernels.attention_auxiliary.default
        if torch._C._len_torch_dispatch_stack():
            enter_formulas()
        try:
            out, *results = op(*arguments)
        except RuntimeError:
            call.check()
            raise
        return out, request.output(*results)
