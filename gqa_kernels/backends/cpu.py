"""CPU backend: the native kernels under ``csrc/cpu``, through one compiled op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd, extension
from ..inputs import AttentionInputs
from .base import FUSED_OPTIONS, Backend, Capabilities


class CPUBackend(Backend):
    name = "cpu"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=256,
        options=FUSED_OPTIONS,
        autograd=True,
    )

    def unavailable_reason(self) -> str | None:
        return extension.unavailable_reason()

    def prepare(self) -> str | None:
        try:
            extension.load()
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


def _int32(head_map: Tensor | None) -> Tensor | None:
    if head_map is None or head_map.dtype == torch.int32:
        return head_map
    # An entry beyond 32 bits must stay out of range, not wrap into it.
    return head_map.long().clamp(-1, 2**31 - 1).to(torch.int32)
