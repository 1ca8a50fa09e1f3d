"""CUDA backend: the native kernels under ``csrc/cuda`` for NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..native import build, env
from .base import ALL_CACHES, FUSED_OPTIONS, Capabilities
from .compiled import CompiledBackend

MIN_CAPABILITY = (8, 0)


class CUDABackend(CompiledBackend):
    name = part = "cuda"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        options=FUSED_OPTIONS,
        autograd=True,
        varlen_autograd=True,
        caches=ALL_CACHES - {"k8v4"},
    )
    append_capabilities = replace(capabilities, dtypes=capabilities.dtypes | {torch.float32})

    def unavailable_reason(self) -> str | None:
        try:
            if env.cuda_kernels() == "0":
                return "GQA_KERNELS_CUDA=0 forbids CUDA kernels"
        except ValueError as error:
            return str(error)
        if torch.version.hip:
            return "this torch is built for ROCm"
        if not torch.cuda.is_available():
            return "no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return f"compute capability must be at least {MIN_CAPABILITY}, got {capability}"
        return build.unavailable_reason("cuda")
