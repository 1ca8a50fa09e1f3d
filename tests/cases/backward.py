"""Backward launches for the emulator, and what their gradients are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.reference.formula import reference_attention
from gqa_kernels.backends.triton.configs import Tile, backward_q_tile
from gqa_kernels.backends.triton.launch.backward import backward_launches
from gqa_kernels.backends.triton.launch.base import Launch
from gqa_kernels.backends.triton.launch.forward import CacheCall, ForwardCall, prefill_launch
from gqa_kernels.backends.triton.plan import plan_for
from gqa_kernels.backends.triton.splits import ceil_div
from gqa_kernels.cache.view import KVView
from gqa_kernels.testing import assert_gradients_close
from tests.emulation.aot import TARGETS, every_option, make_backward, make_call

UNEVEN = HeadMap([1, 0, 1, 1], num_kv_heads=3)  # interleaved, with an empty group

Case = tuple[list[Launch], Callable[[], None]]  # launches, and the check of what they wrote


def dense_case(
    arch: str, q_len: int, kv_len: int, head_dim: int, value_head_dim: int, dtype, **options
) -> Case:
    inputs, forward = make_call(
        q_len, kv_len, head_dim, dtype, value_head_dim=value_head_dim, batch=1, head_map=UNEVEN,
        **options,
    )  # fmt: skip
    out, lse = reference_attention(inputs)
    forward.out.copy_(out)
    forward.lse.copy_(lse)
    call = make_backward(forward)
    call.dlse.masked_fill_(lse == -torch.inf, 0)
    facts = TARGETS[arch].facts
    if inputs.alibi_slopes is not None:
        blocks = ceil_div(q_len, backward_q_tile(forward.shape, facts).block_m)
        call = replace(call, dslopes=torch.full((1, UNEVEN.num_heads, blocks), torch.nan))

    def check() -> None:
        gradients = {"q": call.dq, "k": call.dk, "v": call.dv}
        if call.dslopes is not None:
            gradients["alibi_slopes"] = call.dslopes.sum(-1)[0]
        assert_gradients_close(
            gradients, inputs.q, inputs.k, inputs.v, UNEVEN, dout=call.dout, dlse=call.dlse,
            **options,
        )  # fmt: skip

    return backward_launches(call, facts), check


def backward_causal(arch: str) -> Case:
    return dense_case(arch, 72, 140, 64, 64, torch.bfloat16, causal=True)


def backward_everything(arch: str) -> Case:
    options = every_option(40, 72, UNEVEN.num_heads, 1)
    return dense_case(arch, 40, 72, 48, 32, torch.float16, **options)


def backward_large_scores(arch: str) -> Case:
    """fp32 scores near -1000, after the forward kernel, whose rounding the backward must repeat."""
    inputs, forward = make_call(24, 64, 32, torch.float32, batch=1, head_map=UNEVEN, causal=True)
    for x in (inputs.q, inputs.k):
        x.mul_(0.1)
    inputs.q[..., 0], inputs.k[..., 0] = 1.0, -1000.0 / inputs.scale
    call = make_backward(forward)
    call.dlse.zero_()

    def check() -> None:
        gradients = {"q": call.dq, "k": call.dk, "v": call.dv}
        assert_gradients_close(
            gradients, inputs.q, inputs.k, inputs.v, UNEVEN, dout=call.dout, causal=True
        )

    forward_launch = prefill_launch(forward, Tile(32, 32, 4, 2), 3)
    return [forward_launch, *backward_launches(call, TARGETS[arch].facts)], check


def backward_packed(arch: str) -> Case:
    """Two sequences behind each other: each writes the gradients of its own tokens."""
    q_lens, k_lens = (40, 21), (33, 60)
    parts = [
        make_call(n, m, 64, torch.bfloat16, batch=1, head_map=UNEVEN, seed=n, causal=True)
        for n, m in zip(q_lens, k_lens, strict=True)
    ]
    for inputs, forward in parts:
        out, lse = reference_attention(inputs)
        forward.out.copy_(out)
        forward.lse.copy_(lse)

    def packed(name: str) -> torch.Tensor:
        return torch.cat([getattr(forward, name) for _, forward in parts], 2)

    q_offsets, k_offsets = (
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (q_lens, k_lens)
    )
    k, v = packed("k"), packed("v")
    view = KVView.packed(k, v, k_offsets)
    rows_k, rows_v = (x.expand(len(q_lens), -1, -1, -1) for x in (view.k, view.v))  # as the op does
    inputs, forward = parts[0]
    cache = CacheCall(None, view.kv_begin, q_offsets, max(q_lens), max(k_lens), *[None] * 4)
    forward = ForwardCall(
        packed("q"), rows_k, rows_v, plan_for(inputs), None, None, None, view.kv_lengths,
        inputs.scale, inputs.options.window_left, inputs.options.window_right, 0.0, 0.0, None,
        packed("out"),
        packed("lse"), cache,
    )  # fmt: skip
    call = make_backward(forward)
    call.dlse.masked_fill_(forward.lse == -torch.inf, 0)
    call = replace(call, dk=torch.full_like(k, torch.nan), dv=torch.full_like(v, torch.nan))

    def check() -> None:
        rows, keys = (
            [slice(a, b) for a, b in zip(x[:-1].tolist(), x[1:].tolist(), strict=True)]
            for x in (q_offsets, k_offsets)
        )
        for (one, _), i, j in zip(parts, rows, keys, strict=True):
            gradients = {"q": call.dq[:, :, i], "k": call.dk[:, :, j], "v": call.dv[:, :, j]}
            assert_gradients_close(
                gradients, one.q, one.k, one.v, UNEVEN, dout=call.dout[:, :, i],
                dlse=call.dlse[:, :, i], causal=True,
            )  # fmt: skip

    return backward_launches(call, TARGETS[arch].facts), check


CASES = {
    make.__name__: make
    for make in (backward_causal, backward_everything, backward_large_scores, backward_packed)
}
