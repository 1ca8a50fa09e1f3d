"""What is asked of any tensor that a call or a cache holds: types, layouts, and readable values."""

from __future__ import annotations

import operator
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["bhsd", "bshd"]

LAYOUTS = ("bhsd", "bshd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layout(layout: object) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_last_stride(name: str, x: Tensor) -> None:
    """The last dim must be contiguous, except where it is never stepped through."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(
            f"{name}.stride(-1) must be 1, got {x.stride(-1)}; call {name}.contiguous() first"
        )


def is_readable(x: Tensor) -> bool:
    """Whether the host can look at the values without waiting for a device or breaking a graph."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    )


def as_int(name: str, value: object) -> int:
    """An integer option: a Python or numpy integer, or a 0-d integer tensor that the host can read.
    A SymInt of torch.compile stays one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, Tensor) and not (
        value.dim() == 0 and is_readable(value) and not value.dtype.is_floating_point
        and not value.dtype.is_complex and value.dtype != torch.bool
    ):  # fmt: skip
        raise TypeError(
            f"{name} must be an integer, or a 0-d integer tensor on the CPU, got a {value.dtype} "
            f"tensor of shape {tuple(value.shape)} on {value.device}"
        )
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {shown(value)}")


def to_int32(x: Tensor) -> Tensor:
    """Integers as int32. A value beyond 32 bits stays out of range: it doesn't wrap into it."""
    return x if x.dtype == torch.int32 else x.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def shown(value: object) -> str:
    """A value as an error shows it: never long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
