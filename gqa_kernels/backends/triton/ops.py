"""The op ``gqa_kernels::triton_attention_forward`` and its fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import env
from ..base import empty_output_like
from .configs import device_facts

if env.triton_interpreter():
    from . import interpreter

    interpreter.install()

from .launch import ForwardCall, forward_launches


@torch.library.custom_op("gqa_kernels::triton_attention_forward", mutates_args=())
def triton_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    bshd: bool,
) -> tuple[Tensor, Tensor]:
    """Forward attention on tensors as :class:`~gqa_kernels.inputs.AttentionInputs` has them.

    Args:
        plan: packed head-map plan, see :mod:`gqa_kernels.plan`.
        bshd: memory order of the output ``[B, Sq, Hq, Dv]``, returned as the bhsd view.

    Returns:
        out ``[B, Hq, Sq, Dv]`` and the natural-log LSE, fp32 ``[B, Hq, Sq]``.
    """
    out = empty_output_like(q, v.shape[3], bshd)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call = ForwardCall(
        q, k, v, plan, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left, window_right,
        softcap, out, lse,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for launch in forward_launches(call, device_facts(q.device)):
            launch.run()
    return out, lse


@triton_attention_forward.register_fake
def _(
    q, k, v, plan, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left, window_right,
    softcap, bshd,
):  # fmt: skip
    out = empty_output_like(q, v.shape[3], bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
