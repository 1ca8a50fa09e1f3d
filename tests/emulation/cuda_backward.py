"""Backward calls for the harness: parameters from tensors, gradients by name, tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_kernels.backends.reference import reference_attention
from gqa_kernels.inputs import AttentionInputs
from gqa_kernels.testing import assert_gradients_close

from .cuda_harness import BackwardParams, Call, Phase, Result, Strides, compiled, make_call

UNITS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "alibi_slopes": "dslopes", "sinks": "dsinks"}


@dataclass
class Differentiated:
    """Gradients by the name of the input, and what they were taken for."""

    gradients: dict[str, Tensor]
    dout: Tensor
    dlse: Tensor | None
    result: Result


def phase_for(inputs: AttentionInputs) -> Phase:
    """The units that these inputs need."""
    dim = max(inputs.head_dim, inputs.value_head_dim)
    head_dim_class = next(d for d in (64, 128, 256) if dim <= d)
    unit = f"{UNITS[inputs.dtype]}_d{head_dim_class}"
    return compiled("sm80", "backward", "launch", "numbers", unit)


def make_backward_call(
    inputs: AttentionInputs, use_lse: bool = True, head_map: Tensor | None = None
) -> Call:
    """What the host code passes for these inputs: out and LSE are eager's, dout (in the inputs'
    layout) and dlse random, gradients full of NaN.

    Args:
        use_lse: whether the LSE has a gradient.
        head_map: int32 in place of the inputs' map, which can't hold invalid entries.
    """
    forward = make_call(inputs, head_map=head_map)
    out, lse = reference_attention(inputs, inputs.dtype, True)
    forward.out.copy_(out)
    forward.lse.copy_(lse)
    generator = torch.Generator().manual_seed(3)
    # dout has out's strides and lies like it between elements of others.
    room = torch.full((*out.shape[:3], out.shape[3] + 16), torch.nan, dtype=out.dtype)
    if inputs.layout == "bshd":
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
        tensors["dslopes"] = torch.full(lse.shape[:2], torch.nan)
    if inputs.sinks is not None:
        tensors["dsinks"] = torch.full(lse.shape[1:2], torch.nan)
    params = BackwardParams(call=forward.params)
    for name in ("dout", "dlse", *GRADIENTS.values()):
        if name in tensors:
            setattr(params, name, tensors[name].data_ptr())
    for name in ("dout", "dq", "dk", "dv"):
        setattr(params, f"{name}_stride", Strides(*tensors[name].stride()[:3]))
    return Call(params, tensors)


def differentiate(
    inputs: AttentionInputs, use_lse: bool = True, phase: Phase | None = None,
    head_map: Tensor | None = None, **options,
) -> Differentiated:  # fmt: skip
    """Run the backward; ``options`` are of :meth:`Phase.run`."""
    call = make_backward_call(inputs, use_lse, head_map)
    result = (phase or phase_for(inputs)).run(call, **options)
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
