"""Backward calls for the harness: parameters from tensors, gradients by name, tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_kernels.backends.reference.formula import reference_attention
from gqa_kernels.call.attention import AttentionCall
from gqa_kernels.testing import assert_gradients_close

from .cuda_harness import Call, Phase, Result, compiled, make_call
from .cuda_params import BackwardParams, Strides

UNITS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "alibi_slopes": "dslopes", "sinks": "dsinks"}


@dataclass
class Differentiated:
    """Gradients by the name of the input, and what they were taken for."""

    gradients: dict[str, Tensor]
    dout: Tensor
    dlse: Tensor | None
    result: Result


def phase_for(inputs: AttentionCall) -> Phase:
    """The units that these inputs need."""
    dim = max(inputs.head_dim, inputs.value_head_dim)
    head_dim_class = next(d for d in (64, 128, 256) if dim <= d)
    unit = f"{UNITS[inputs.dtype]}_d{head_dim_class}"
    return compiled("sm80", "backward", "launch", "row_stats", unit)


def make_backward_call(
    inputs: AttentionCall, use_lse: bool = True, head_map: Tensor | None = None
) -> Call:
    """What the host code passes for these inputs: out and LSE as a forward kernel gives them (fp32
    but for P and out, which are rounded), dout (in the inputs' layout) and dlse random, gradients
    full of NaN.

    Args:
        use_lse: whether the LSE has a gradient.
        head_map: int32 in place of the inputs' map, which can't hold invalid entries.
    """
    forward = make_call(inputs, head_map=head_map)
    out, lse = reference_attention(inputs, base2=True)
    forward.out.copy_(out)
    forward.lse.copy_(lse)
    return _with_gradients(forward, inputs, use_lse, inputs.k.shape[2])


@dataclass
class Packed:
    """Sequences behind each other in q, k and v of batch 1, and tokens of none after the last.

    Attributes:
        inputs: a call on all of it; ``alibi_slopes`` are ``[B, Hq]``.
        q_offsets, k_offsets: ``[B + 1]`` tokens.
    """

    inputs: AttentionCall
    q_offsets: list[int]
    k_offsets: list[int]

    @property
    def batch(self) -> int:
        return len(self.q_offsets) - 1

    def tokens(self, b: int) -> tuple[slice, slice]:
        """Of the queries and the keys of a sequence."""
        return slice(*self.q_offsets[b : b + 2]), slice(*self.k_offsets[b : b + 2])

    def sequence(self, b: int) -> AttentionCall:
        """The call on one sequence."""
        rows, keys = self.tokens(b)
        x, slopes = self.inputs, self.inputs.alibi_slopes
        return x.replace(
            q=x.q[:, :, rows], k=x.k[:, :, keys], v=x.v[:, :, keys],
            alibi_slopes=None if slopes is None else slopes[b : b + 1],
        )  # fmt: skip


def make_packed_call(packed: Packed) -> Call:
    """The same for packed sequences; dQ, dK and dV are full of zeros, as the host code makes
    them. Grids are for longer sequences than there are."""
    inputs, batch = packed.inputs, packed.batch
    q_offsets, k_offsets = (
        torch.tensor(x, dtype=torch.int32) for x in (packed.q_offsets, packed.k_offsets)
    )
    k, v = (x.expand(batch, -1, -1, -1) for x in (inputs.k, inputs.v))
    lengths = k_offsets.diff()[:, None].expand(batch, k.shape[1])
    forward = make_call(
        inputs.replace(k=k, v=v, kv_lengths=lengths), batch=batch, q_offsets=q_offsets,
        max_q_len=int(q_offsets.diff().max()) + 100, kv_begin=k_offsets[:-1].contiguous(),
    )  # fmt: skip
    for b in range(batch):
        rows, _ = packed.tokens(b)
        part = packed.sequence(b)
        if part.q_len:
            out, lse = reference_attention(part, base2=True)
            forward.out[:, :, rows], forward.lse[:, :, rows] = out, lse
    call = _with_gradients(forward, inputs, True, int(k_offsets.diff().max()) + 100)
    for name in ("dout", "dlse"):
        call.tensors[name][:, :, packed.q_offsets[-1] :] = torch.nan
    for name in ("dk", "dv"):
        stride = getattr(call.params, f"{name}_stride")
        setattr(call.params, f"{name}_stride", Strides(0, stride.h, stride.s))
    for name in ("dq", "dk", "dv"):
        call.tensors[name].zero_()
    return call


def _with_gradients(forward: Call, inputs: AttentionCall, use_lse: bool, max_kv_len: int) -> Call:
    """Gradients of the outputs and room for the inputs'."""
    out, lse = forward.out, forward.lse
    generator = torch.Generator().manual_seed(3)
    # dout has out's strides and lies like it between elements of others.
    room = torch.full((*out.shape[:3], out.shape[3] + 16), torch.nan, dtype=out.dtype)
    if inputs.bshd:
        room = room.transpose(1, 2).contiguous().transpose(1, 2)
    dout = room[..., : out.shape[3]].copy_(torch.randn(out.shape, generator=generator))
    tensors = {
        **forward.tensors, "dout": dout,
        **{f"d{name}": torch.full_like(getattr(inputs, name), torch.nan) for name in "qkv"},
    }  # fmt: skip
    if use_lse:
        dlse = torch.randn(lse.shape, generator=generator)
        tensors["dlse"] = dlse.masked_fill(lse == -torch.inf, 0)
    if inputs.alibi_slopes is not None:
        tensors["dslopes"] = torch.full(inputs.alibi_slopes.shape, torch.nan)
    if inputs.sinks is not None:
        tensors["dsinks"] = torch.full(lse.shape[1:2], torch.nan)
    params = BackwardParams(call=forward.params, max_kv_len=max_kv_len)
    for name in ("dout", "dlse", *GRADIENTS.values()):
        if name in tensors:
            setattr(params, name, tensors[name].data_ptr())
    for name in ("dout", "dq", "dk", "dv"):
        setattr(params, f"{name}_stride", Strides(*tensors[name].stride()[:3]))
    return Call(params, tensors)


def differentiate(
    inputs: AttentionCall, use_lse: bool = True, phase: Phase | None = None,
    head_map: Tensor | None = None, **options,
) -> Differentiated:  # fmt: skip
    """Run the backward; ``options`` are of :meth:`Phase.run`."""
    call = make_backward_call(inputs, use_lse, head_map)
    return _run(call, phase or phase_for(inputs), **options)


def differentiate_packed(packed: Packed, phase: Phase | None = None, **options) -> Differentiated:
    """The same of packed sequences."""
    return _run(make_packed_call(packed), phase or phase_for(packed.inputs), **options)


def _run(call: Call, phase: Phase, **options) -> Differentiated:
    result = phase.run(call, **options)
    gradients = {
        name: call.tensors[gradient]
        for name, gradient in GRADIENTS.items()
        if gradient in call.tensors
    }
    return Differentiated(gradients, call.tensors["dout"], call.tensors.get("dlse"), result)


def check_gradients(found: Differentiated, q, k, v, head_map, **options) -> None:
    """Hold them to the package's tolerance rule; arguments as the API takes them."""
    gradients = dict(found.gradients)
    bshd = options.get("layout") == "bshd"
    if bshd:
        gradients |= {name: gradients[name].transpose(1, 2) for name in "qkv"}
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 1:
        gradients["alibi_slopes"] = gradients["alibi_slopes"].sum(0)
    dout = found.dout.transpose(1, 2) if bshd else found.dout
    assert_gradients_close(gradients, q, k, v, head_map, dout=dout, dlse=found.dlse, **options)
