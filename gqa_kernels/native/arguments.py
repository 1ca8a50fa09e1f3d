"""Arguments as callers pass them: Python or numpy scalars, 0-d tensors, and words from a list.

Every function takes the argument's name, so that errors name what the caller wrote. Symbolic
values of torch.compile pass through unchecked: a check of their value would specialise the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Symbolic numbers of torch.compile. They act as numbers, but torch's annotations don't say so.
_SymInt: type[Any] = torch.SymInt
_SymNumber: tuple[type[Any], ...] = (torch.SymFloat, torch.SymInt)
_Bools: tuple[type[Any], ...] = (bool, torch.SymBool)


def as_int(name: str, value: Any) -> int:
    """An integer: Python's, numpy's, or a 0-d integer tensor on the CPU."""
    if type(value) is int or isinstance(value, _SymInt):
        return value
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer, got a tensor of {value.dtype}")
        return int(_item(name, value))
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {shown(value)}")


def as_float(name: str, value: Any) -> float:
    """A finite real number: Python's, numpy's, or a 0-d tensor on the CPU."""
    if isinstance(value, _SymNumber):
        return value
    if torch.compiler.is_compiling() and isinstance(value, (float, int)):
        return value  # may be symbolic, in spite of its annotation
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, got a tensor of {value.dtype}")
        value = _item(name, value)
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a real number, got {shown(value)}")
    try:
        number = float(value)
    except TypeError:
        raise TypeError(f"{name} must be a real number, got {shown(value)}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def as_bool(name: str, value: Any) -> bool:
    """True or False: Python's or numpy's, the numbers 1 and 0, or a 0-d boolean tensor."""
    if isinstance(value, _Bools):
        return value
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return bool(_item(name, value))
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if type(value) is int and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def as_device(device: object) -> torch.device:
    """A device, or what ``torch.device`` makes of its name."""
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device must be a torch.device or its name, got {shown(device)}")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"device must name one, got {device!r}: {error}") from None


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """``value`` must be one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}")


def check_tensors(**values: object) -> None:
    """Each value must be a tensor, and not a sparse one."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout is not torch.strided:
            raise TypeError(f"{name}.layout must be torch.strided, got {value.layout}")


def shown(value: object) -> str:
    """A value as an error shows it: shortened, and a tensor without its values."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _item(name: str, x: Tensor) -> int | float | bool:
    """The value of a 0-d tensor on the CPU. Reading one on an accelerator would synchronise
    silently."""
    if x.dim() != 0 or x.device.type != "cpu":
        raise TypeError(f"{name} must be a number or a 0-d tensor on the CPU, got {shown(x)}")
    return x.item()
