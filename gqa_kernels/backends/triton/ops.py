"""The op ``gqa_kernels::triton_attention_forward`` and its fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native import env
from ..base import empty_output_like
from .configs import device_facts

if env.triton_interpreter():
    from . import interpreter

    interpreter.install()

from ...cache.inputs import AppendInputs
from ...cache.view import KVView
from .cache_launch import append_launch
from .launch import CacheCall, ForwardCall, forward_launches


@torch.library.custom_op("gqa_kernels::triton_attention_forward", mutates_args=())
def triton_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    value_head_map: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    bshd: bool,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward attention on tensors as :class:`~gqa_kernels.inputs.AttentionInputs` has them.

    Args:
        plan: packed head-map plan, see :mod:`gqa_kernels.plan`.
        value_head_map: integers ``[Hq]`` where V is grouped apart (the plan has it too), else None.
        bshd: memory order of the output ``[B, Sq, Hq, Dv]``, returned as the bhsd view.

    Returns:
        out ``[B, Hq, Sq, Dv]`` and the natural-log LSE, fp32 ``[B, Hq, Sq]``.
    """
    out = empty_output_like(q, v.shape[3], bshd)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call = ForwardCall(
        q, k, v, plan, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left, window_right,
        softcap, dropout_p, dropout_seed, out, lse,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for launch in forward_launches(call, device_facts(q.device)):
            launch.run()
    return out, lse


@triton_attention_forward.register_fake
def _(
    q, k, v, plan, value_head_map, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left,
    window_right, softcap, bshd, dropout_p=0.0, dropout_seed=None,
):  # fmt: skip
    out = empty_output_like(q, v.shape[3], bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gqa_kernels::triton_cache_attention_forward", mutates_args=())
def triton_cache_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor,
    page_table: Tensor | None,
    kv_begin: Tensor | None,
    q_offsets: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_zero: Tensor | None,
    v_zero: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    bshd: bool,
) -> tuple[Tensor, Tensor]:
    """Forward attention over a cache: tensors as :class:`~gqa_kernels.cache.inputs.CacheInputs`
    and its view have them; ``plan``, ``bshd`` and results as for ``triton_attention_forward``."""
    out = empty_output_like(q, _value_head_dim(v), bshd)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cache = CacheCall(
        page_table, kv_begin, q_offsets, max_q_len, max_kv_len, k_scale, v_scale, k_zero, v_zero
    )
    call = ForwardCall(
        q, k, v, plan, alibi_slopes, sinks, attn_mask, kv_lengths, scale, window_left, window_right,
        softcap, 0.0, None, out, lse, cache,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for launch in forward_launches(call, device_facts(q.device)):
            launch.run()
    return out, lse


@triton_cache_attention_forward.register_fake
def _(
    q, k, v, plan, alibi_slopes, sinks, attn_mask, kv_lengths, page_table, kv_begin, q_offsets,
    max_q_len, max_kv_len, k_scale, v_scale, k_zero, v_zero, scale, window_left, window_right,
    softcap, bshd,
):  # fmt: skip
    out = empty_output_like(q, _value_head_dim(v), bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _value_head_dim(v: Tensor) -> int:
    return v.shape[3] * (2 if v.dtype == torch.uint8 else 1)  # int4: two numbers in a byte


@torch.library.custom_op(
    "gqa_kernels::triton_cache_append",
    mutates_args=("k", "v", "k_scale", "v_scale", "k_zero", "v_zero"),
)
def triton_cache_append(
    q: Tensor | None,
    k_new: Tensor,
    v_new: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lengths: Tensor,
    page_table: Tensor | None,
    kv_begin: Tensor | None,
    new_offsets: Tensor | None,
    max_new: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_zero: Tensor | None,
    v_zero: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
) -> Tensor:
    """Write new tokens into a cache: tensors as :class:`~gqa_kernels.cache.inputs.AppendInputs`
    and its view have them. Returns q rotated; an empty tensor without q."""
    view = KVView(k, v, kv_lengths, page_table, kv_begin, k_scale, v_scale, k_zero, v_zero)
    inputs = AppendInputs(
        q, k_new, v_new, view, new_offsets, max_new, rotary_cos, rotary_sin, rotary_interleaved
    )
    rotated = None if q is None else torch.empty_like(q)
    with torch.cuda.device_of(k):
        launch = append_launch(inputs, rotated)
        if launch is not None:
            launch.run()
    return k_new.new_empty(0) if rotated is None else rotated


@triton_cache_append.register_fake
def _(q, k_new, *_):
    return k_new.new_empty(0) if q is None else torch.empty_like(q)
