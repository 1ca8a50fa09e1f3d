"""The ops ``gqa_kernels::triton_*``: the arguments of the compiled ops, with a plan of the head map
(:mod:`.plan`) instead of the map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.append import AppendCall
from ...call.keep import KeepCall
from ...native import autograd, env, flops, schema
from .configs import device_facts

if env.triton_interpreter():
    from . import interpreter

    interpreter.install()

from .launch.append import append_launch
from .launch.backward import BackwardCall, run_backward, sinks_gradient
from .launch.forward import CacheCall, ForwardCall, forward_launches
from .launch.keep import keep_launch
from .launch.key_scores import key_scores_launch

FORWARD, BACKWARD = schema.forward("plan"), schema.backward("plan")
AUXILIARY, INTO = schema.auxiliary("plan"), schema.into("plan")


@torch.library.custom_op(
    "gqa_kernels::triton_attention_forward", mutates_args=(), schema=FORWARD.text
)
def triton_attention_forward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """See :func:`gqa_kernels.native.schema.forward`."""
    call = FORWARD.Arguments(*arguments, **named)
    out, lse = schema.empty_results(call)
    with torch.cuda.device_of(call.q):
        for launch in forward_launches(_forward_call(call, out, lse), device_facts(call.q.device)):
            launch.run()
    return out, lse


@torch.library.custom_op(
    "gqa_kernels::triton_attention_into", mutates_args=schema.FILLED, schema=INTO.text
)
def triton_attention_into(*arguments: Any, **named: Any) -> None:
    """See :func:`gqa_kernels.native.schema.into`."""
    call = INTO.Arguments(*arguments, **named)
    lse = call.lse
    if lse is None:
        lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
    with torch.cuda.device_of(call.q):
        forward = _forward_call(call, call.out, lse)
        for launch in forward_launches(forward, device_facts(call.q.device)):
            launch.run()


@torch.library.custom_op(
    "gqa_kernels::triton_attention_auxiliary", mutates_args=(), schema=AUXILIARY.text
)
def triton_attention_auxiliary(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """See :func:`gqa_kernels.native.schema.auxiliary`."""
    call = AUXILIARY.Arguments(*arguments, **named)
    out, lse, most, sums = schema.empty_auxiliary(call)
    row_max = torch.empty_like(lse) if call.max_scores else None
    forward = replace(_forward_call(call, out, lse), row_max=row_max)
    with torch.cuda.device_of(call.q):
        for launch in forward_launches(forward, device_facts(call.q.device)):
            launch.run()
        launch = key_scores_launch(forward, sums, call.key_scores)
        if launch is not None:
            launch.run()
    if row_max is not None:
        most = _max_of_sequences(row_max, call.q_offsets)
    return out, lse, most, sums


def _max_of_sequences(row_max: Tensor, q_offsets: Tensor | None) -> Tensor:
    """``[B, Hq]`` of ``[B, Hq, Sq]``, or of packed ``[1, Hq, tokens]``; -inf without queries."""
    if q_offsets is None:
        return torch.nn.functional.pad(row_max, (0, 1), value=-torch.inf).amax(2)
    token = torch.arange(row_max.shape[2], device=row_max.device)
    sequence = torch.searchsorted(q_offsets[1:], token, right=True)  # B: of no sequence
    heads, batch = row_max.shape[1], q_offsets.shape[0] - 1
    most = row_max.new_full((heads, batch + 1), -torch.inf)
    most.scatter_reduce_(1, sequence.expand(heads, -1), row_max[0], "amax")
    return most[:, :batch].t().contiguous()


@torch.library.custom_op(
    "gqa_kernels::triton_attention_backward", mutates_args=(), schema=BACKWARD.text
)
def triton_attention_backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """See :func:`gqa_kernels.native.schema.backward`."""
    call = BACKWARD.Arguments(*arguments, **named)
    lse, offsets = call.lse, call.q_offsets
    dq, dk, dv, dslopes, dsinks = schema.empty_gradients(call)
    if offsets is not None:  # tokens of no sequence have none
        for gradient in (dq, dk, dv):
            gradient.zero_()
    backward = BackwardCall(
        _forward_call(call, call.out, lse), call.value_head_map is None, call.dout, call.dlse,
        torch.empty_like(lse), dq, dk, dv, None, call.need_sinks,
    )  # fmt: skip
    with torch.cuda.device_of(call.q):
        slopes, delta = run_backward(backward, device_facts(call.q.device), call.need_slopes)
    if call.need_sinks:
        if offsets is not None:  # tokens of no sequence have any LSE
            token = torch.arange(lse.shape[2], device=lse.device)
            lse = lse.masked_fill(token >= offsets[-1], -torch.inf)
        dsinks = sinks_gradient(call.sinks, lse, delta)
    return dq, dk, dv, slopes if call.need_slopes else dslopes, dsinks


@torch.library.custom_op(
    "gqa_kernels::triton_cache_append", mutates_args=schema.WRITTEN, schema=schema.APPEND.text
)
def triton_cache_append(*arguments: Any, **named: Any) -> Tensor:
    """See :data:`gqa_kernels.native.schema.APPEND`."""
    call = AppendCall.of_arguments(schema.APPEND.Arguments(*arguments, **named))
    rotated = None if call.q is None else torch.empty_like(call.q)
    with torch.cuda.device_of(call.k_new):
        launch = append_launch(call, rotated)
        if launch is not None:
            launch.run()
    return call.k_new.new_empty(0) if rotated is None else rotated


@torch.library.custom_op(
    "gqa_kernels::triton_cache_keep", mutates_args=schema.WRITTEN, schema=schema.KEEP.text
)
def triton_cache_keep(*arguments: Any, **named: Any) -> None:
    """See :data:`gqa_kernels.native.schema.KEEP`."""
    call = KeepCall.of_arguments(schema.KEEP.Arguments(*arguments, **named))
    with torch.cuda.device_of(call.kv.k):
        launch = keep_launch(call)
        if launch is not None:
            launch.run()


def _forward_call(call: Any, out: Tensor, lse: Tensor) -> ForwardCall:
    """What the kernels take, from the arguments of either op."""
    given, q, k, v = call._asdict(), call.q, call.k, call.v
    in_memory = ("page_table", "kv_begin", "k_scale", "v_scale", "k_zero", "v_zero")
    where = {name: given.get(name) for name in in_memory}
    cache = None
    if call.q_offsets is not None or any(x is not None for x in where.values()):
        table, batch = where["page_table"], call.kv_lengths.shape[0]
        if table is None and k.shape[0] != batch:  # one row of packed sequences
            k, v = (x.expand(batch, -1, -1, -1) for x in (k, v))
        pages = 1 if table is None else table.shape[2]
        sizes = (q.shape[2], pages * k.shape[2])
        if call.q_offsets is not None:
            sizes = (call.max_q_len, call.max_kv_len)
        cache = CacheCall(
            table, where["kv_begin"], call.q_offsets, *sizes, where["k_scale"], where["v_scale"],
            where["k_zero"], where["v_zero"],
        )  # fmt: skip
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    return ForwardCall(
        q, k, v, call.plan, call.alibi_slopes, call.sinks, call.attn_mask, call.kv_lengths, scale,
        call.window_left, call.window_right, call.softcap, call.dropout_p, call.dropout_seed, out,
        lse, cache,
    )  # fmt: skip


for _op, _fake in (
    (triton_attention_forward, schema.fake_forward(FORWARD)),
    (triton_attention_auxiliary, schema.fake_auxiliary(AUXILIARY)),
    (triton_attention_into, schema.fake_nothing),
    (triton_attention_backward, schema.fake_backward(BACKWARD)),
    (triton_cache_append, schema.fake_append),
    (triton_cache_keep, schema.fake_nothing),
):
    _op.register_fake(_fake)
autograd.register(
    "gqa_kernels::triton_attention_forward", "gqa_kernels::triton_attention_backward", FORWARD,
    BACKWARD,
)  # fmt: skip
flops.register("triton_attention_forward", FORWARD)
flops.register("triton_attention_auxiliary", AUXILIARY)
flops.register("triton_attention_into", INTO)
flops.register("triton_attention_backward", BACKWARD, is_backward=True)
