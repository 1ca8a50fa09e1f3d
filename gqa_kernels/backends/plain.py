"""The short way of plain calls on the CPU: a HeadMap, no options, nothing to differentiate.

Checking and describing a call costs more than the attention of one token over a short context. A
plain call goes to the compiled op at once, which checks shapes, types and strides itself; whatever
it refuses is left to the long way, whose errors are the public ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import extension
from ..head_map import HeadMap
from ..inputs import LAYOUTS, UNBOUNDED


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_map: object,
    causal: bool,
    scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor] | None:
    """Out in the caller's layout and LSE, as the CPU backend gives them; None where the call is not
    a plain one. Arguments are those of :func:`gqa_kernels.asym_gqa_attention`, unchecked."""
    if not (
        type(q) is type(k) is type(v) is Tensor
        and type(head_map) is HeadMap
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and extension.library_path() is not None
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and layout in LAYOUTS
        and not _is_recorded(q, k, v)
    ):
        return None
    bshd = layout == "bshd"
    try:
        with torch._C._AutoDispatchBelowAutograd():
            if bshd:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if not k.shape[1] == v.shape[1] == head_map.num_kv_heads:
                return None
            out, lse = torch.ops.gqa_kernels.attention_forward.default(
                q, k, v, head_map.cpu_tensor, None, None, None, None, None,
                q.shape[3] ** -0.5 if scale is None else scale,
                UNBOUNDED, 0 if causal else UNBOUNDED, 0.0, bshd and q.shape[2] > 1, 0.0, None,
            )  # fmt: skip
            return out.transpose(1, 2) if bshd else out, lse
    except (IndexError, RuntimeError, ZeroDivisionError):
        return None


def _is_recorded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd, autocast, torch.compile or torch.func have a part in the call."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or torch.is_autocast_enabled("cpu")
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
