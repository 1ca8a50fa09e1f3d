"""In which order ``backend="auto"`` tries the backends: data, by device, architecture and work.

On CUDA devices our CUDA kernels come first, but for the work that they do on an architecture only
with instructions of an older one. Triton compiles the same work to the newer instructions:

- Compute capability 10.x (B200): prefill and the backward. The CUDA kernels are those of sm_80,
  on ``mma.sync``; Triton uses ``tcgen05``.
- 9.0 (H100, H200): the backward, which has no kernel on ``wgmma`` yet. One backend runs a call's
  forward and backward, so calls whose inputs require grad go to Triton as a whole.

Decode and appends are limited by memory and stay with CUDA everywhere. 12.x (RTX 50) has neither
``wgmma`` nor ``tcgen05``: the kernels of sm_80 are the right ones for it.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..call.append import AppendCall
from ..call.attention import AttentionCall
from ..call.keep import KeepCall
from .base import constant_while_compiling

Work = Literal["prefill", "decode", "backward", "memory"]

# Triton's interpreter on CPU tensors is for tests: only an explicit backend="triton" takes it.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
ORDER_ELSEWHERE = ("reference",)
#: Where Triton comes before CUDA: major compute capability, and work.
TRITON_FIRST: frozenset[tuple[int, Work]] = frozenset(
    {(9, "backward"), (10, "prefill"), (10, "backward")}
)
#: Query tokens of a sequence up to which a call is decode: kDecodeQueries of csrc/cuda.
DECODE_QUERIES = 16


def auto_order(call: AttentionCall | AppendCall | KeepCall) -> tuple[str, ...]:
    """Names of the backends in the order in which ``"auto"`` tries them for a call."""
    device = call.device
    order = ORDER.get(device.type, ORDER_ELSEWHERE)
    if device.type == "cuda":
        major = _major_capability(device.index)
        known = any(arch == major for arch, _ in TRITON_FIRST)  # else sizes don't matter
        if known and (major, work_of(call)) in TRITON_FIRST:
            return ("triton", *(name for name in order if name != "triton"))
    return order


def work_of(call: AttentionCall | AppendCall | KeepCall) -> Work:
    """What a call mostly does. ``"memory"``: it reads or writes a cache and attends to nothing."""
    if not isinstance(call, AttentionCall):
        return "memory"
    if call.requires_grad:
        return "backward"
    return "decode" if is_decode(call) else "prefill"


def is_decode(call: AttentionCall) -> bool:
    """Whether a call has few query tokens."""
    return call.q_len <= DECODE_QUERIES


@constant_while_compiling
def _major_capability(index: int | None) -> int | None:
    """Of a CUDA device; None without one."""
    if torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)[0]
