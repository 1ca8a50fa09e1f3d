"""CPU backend: the native kernels under ``csrc/cpu``."""

from __future__ import annotations

import torch

from ..native import build
from .base import ALL_CACHES, FUSED_OPTIONS, Capabilities
from .compiled import CompiledBackend


class CPUBackend(CompiledBackend):
    name = part = "cpu"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=576,
        options=FUSED_OPTIONS | {"batch_invariant", "varlen_mask", "key_ranges"},
        autograd=True,
        varlen_autograd=True,
        caches=ALL_CACHES,
    )

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()
