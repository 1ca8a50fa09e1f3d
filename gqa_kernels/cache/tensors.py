"""What is asked of any tensor that a call or a cache holds: types, layouts, and readable values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..native.arguments import check_choice

Layout = Literal["bhsd", "bshd"]

LAYOUTS = ("bhsd", "bshd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layout(layout: object) -> None:
    check_choice("layout", layout, LAYOUTS)


def check_last_stride(name: str, x: Tensor) -> None:
    """The last dim must be contiguous, unless it is never stepped through."""
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


def to_int32(x: Tensor) -> Tensor:
    """Integers as int32. A value beyond 32 bits stays out of range: it doesn't wrap into it."""
    return x if x.dtype == torch.int32 else x.clamp(-(2**31), 2**31 - 1).to(torch.int32)
