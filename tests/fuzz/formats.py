"""What quantised caches store, from the documentation, written apart from the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A format: a stored number represents ``(stored - zero) * scale``.

    Attributes:
        largest: what the largest magnitude of a row is stored as, measured from the zero.
        zero: where none is given.
    """

    name: str
    dtype: torch.dtype
    low: float
    high: float
    largest: float
    zero: float = 0.0

    @property
    def integer(self) -> bool:
        return not self.dtype.is_floating_point

    @property
    def per_byte(self) -> int:
        return 2 if self.name == "int4" else 1


STORED = {
    x.name: x
    for x in (
        Stored("fp8_e4m3", torch.float8_e4m3fn, -448, 448, 448),
        Stored("fp8_e5m2", torch.float8_e5m2, -57344, 57344, 57344),
        Stored("int8", torch.int8, -128, 127, 127),
        Stored("int4", torch.uint8, 0, 15, 7, zero=8.0),
    )
}


def values(memory: Tensor, format: Stored, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Values of rows ``[..., D]``, with a scale (and zero) per row. They are fp32 numbers: formats
    are defined in fp32 arithmetic."""
    if format.per_byte == 2:
        memory = torch.stack([memory % 16, memory // 16], -1).flatten(-2)
    zero = format.zero if zero is None else zero[..., None]
    return ((memory.float() - zero) * scale[..., None]).double()


def row_scale(x: Tensor, format: Stored, with_zero: bool) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero) that fills the format with each row's range."""
    x = x.float()
    if not with_zero:
        return x.abs().amax(-1) / format.largest, None
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scale = (high - low) / (format.high - format.low)
    return scale, format.low - torch.where(scale > 0, (low / scale).round(), 0)


def stored(x: Tensor, format: Stored, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Rows as memory: divide, round to nearest even, saturate."""
    scale = scale[..., None]
    number = torch.where(scale > 0, x.float() / scale, 0)
    if format.integer:
        number = number.round()
    number = number + (format.zero if zero is None else zero[..., None])
    number = number.clamp(format.low, format.high)
    if format.per_byte == 2:
        number = number.to(torch.uint8)
        return number[..., ::2] + 16 * number[..., 1::2]
    return number.to(format.dtype)


def largest_step(x: Tensor, format: Stored, scale: Tensor, zero: Tensor | None) -> Tensor:
    """How far ``values(stored(x))`` may lie from rows ``x`` inside the range, ``[..., D]``."""
    scale = scale[..., None].double()
    if format.integer:
        # The zero is rounded too, so an end of the range may be clamped by half a step more.
        return scale * (0.5 if zero is None else 1.0)
    mantissa, smallest = (3, 2.0**-9) if format.name == "fp8_e4m3" else (2, 2.0**-16)
    return torch.maximum(x.double().abs() * 2.0 ** -(mantissa + 1), scale * smallest / 2)
