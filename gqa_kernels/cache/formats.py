"""Quantised caches: what a stored number means, and how a row becomes stored numbers.

A row is one token of one head, ``[D]``. A stored number represents ``(stored - zero) * scale``:

| format     | storage                         | stored range | default zero            |
|------------|---------------------------------|--------------|--------------------------|
| fp8_e4m3   | ``torch.float8_e4m3fn``         | +-448        | 0                        |
| fp8_e5m2   | ``torch.float8_e5m2``           | +-57344      | 0                        |
| int8       | ``torch.int8``                  | -128 .. 127  | 0                        |
| int4       | ``torch.uint8``, two per byte   | 0 .. 15      | 8                        |

A cache ``k8v4`` has K in int8 and V in int4; in all others both have one format.

int4 keeps element ``2i`` in the low half of byte ``i`` and element ``2i + 1`` in the high half.
Arithmetic is fp32 with true divisions, rounding is to nearest even, and what exceeds the range
saturates. These functions are the definition: every append kernel stores the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A storage format.

    Attributes:
        name: as in the table above.
        storage: torch dtype of the memory.
        low, high: smallest and largest stored number.
        symmetric_high: if no zeros are kept, the largest magnitude of a row is stored as this
            distance from the zero.
        default_zero: the zero if none is given.
        per_byte: stored numbers in one element of the memory.
        integer: whether stored numbers are integers, so that a zero can be one.
    """

    name: str
    storage: torch.dtype
    low: float
    high: float
    symmetric_high: float
    default_zero: float
    per_byte: int
    integer: bool


FORMATS = {
    format.storage: format
    for format in (
        Format("fp8_e4m3", torch.float8_e4m3fn, -448.0, 448.0, 448.0, 0.0, 1, False),
        Format("fp8_e5m2", torch.float8_e5m2, -57344.0, 57344.0, 57344.0, 0.0, 1, False),
        Format("int8", torch.int8, -128.0, 127.0, 127.0, 0.0, 1, True),
        Format("int4", torch.uint8, 0.0, 15.0, 7.0, 8.0, 2, True),
    )
}
FORMAT_OF_NAME = {format.name: format for format in FORMATS.values()}
# What caches can be stored in, by name: the formats of K and V.
K8V4 = "k8v4"  # keys take more error than values do: scores enter an exponential
STORED_AS = {name: (format, format) for name, format in FORMAT_OF_NAME.items()} | {
    K8V4: (FORMAT_OF_NAME["int8"], FORMAT_OF_NAME["int4"])
}
NAME_OF_STORAGE = {(k.storage, v.storage): name for name, (k, v) in STORED_AS.items()}


def row_scales(x: Tensor, format: Format, with_zero: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each row, so that the row's range fills the format's.

    With a zero the range is that from the row's smallest to its largest element, 0 included, so
    that 0 stays exact; without, it is symmetric around 0. A row of zeros has scale 0.

    Args:
        x: ``[..., D]`` of any floating type.
        with_zero: int8 and int4 only.

    Returns:
        scale and zero (None without), fp32 ``[...]``.
    """
    x = x.float()
    if not with_zero:
        return x.abs().amax(-1) / format.symmetric_high, None
    low, high = x.amin(-1).clamp(max=0.0), x.amax(-1).clamp(min=0.0)
    scale = (high - low) / (format.high - format.low)
    zero = format.low - torch.where(scale > 0, torch.round(low / scale), 0.0)
    return scale, zero


def quantize(x: Tensor, format: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Stored numbers of rows ``[..., D]`` with a scale and zero each, as memory: ``[..., D]`` or,
    for int4, ``[..., D / 2]``. With scale 0 every element is stored as the zero."""
    scale = scale[..., None]
    stored = torch.where(scale > 0, x.float() / scale, 0.0)
    if format.integer:
        stored = stored.round().nan_to_num(0.0)  # a NaN has no integer; its row's scale is NaN
    stored = stored + (format.default_zero if zero is None else zero[..., None])
    stored = stored.clamp(format.low, format.high)
    if format.per_byte == 2:
        stored = stored.to(torch.uint8)
        return stored[..., 0::2] | (stored[..., 1::2] << 4)
    return stored.to(format.storage)


def dequantize(stored: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """fp32 values of memory ``[..., D]`` (int4: ``[..., D / 2]``), a scale and zero per row."""
    format = FORMATS[stored.dtype]
    if format.per_byte == 2:
        stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)
    zeros = format.default_zero if zero is None else zero[..., None]
    return (stored.float() - zeros) * scale[..., None]
