"""Invalid calls: each must end in a clear error or in a result, never in a crash."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gqa_kernels import HeadMap, asym_gqa_decode

from .caches import CACHE_NAMES, draw_cache
from .draw import DTYPES, Call, Draw

EXPECTED_ERRORS = (TypeError, ValueError, NotImplementedError)
INTEGERS = (-1, 0, 1, 3, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 2**70)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-40, 1e300, 0.5)
LARGEST = 1 << 22  # elements of a tensor whose values may be replaced
DTYPE_NAMES = (
    "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64",
    "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "uint16",
)  # fmt: skip


def draw_constructor(draw: Draw) -> Call:
    """A cache made from parts, then used, so that what a constructor let pass is tried too."""
    dtype = draw.pick(*DTYPES)
    (make, made_of), place = draw_cache(draw, 0, None, dtype)
    dim = place.k.shape[3] * (place.format.per_byte if place.format else 1)
    q = draw.normal(len(place.begin), 3, 2, dim, dtype=dtype)
    head_map = draw.entries(3, place.k.shape[1])
    backend = draw.pick("cpu", "auto", "reference")

    def construct_and_decode(**arguments):
        cache = make(**arguments)
        return asym_gqa_decode(q, cache, head_map, backend=backend)

    construct_and_decode.__wrapped__ = make
    return Call(construct_and_decode, made_of, lambda result: None, (CACHE_NAMES.get(make, ""),))


def spoil(draw: Draw, call: Call) -> None:
    """Replace one or two arguments of a call by others."""
    parameters = inspect.signature(call.function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    given = [name for name in call.arguments if draw.chance(0.9)]
    for _ in range(draw.pick(1, 1, 1, 2)):
        name = draw.pick(*(given if given and draw.chance(0.8) else names))
        call.arguments[name] = spoilt(draw, call.arguments.get(name))


def spoilt(draw: Draw, x: object) -> object:
    """Something like an argument, and wrong for most calls."""
    if isinstance(x, Tensor) and x.numel() < LARGEST and draw.chance(0.75):
        if x.layout != torch.strided or x.device.type == "meta":  # spoilt already
            return x
        return draw.pick(*SPOIL_TENSOR)(draw, x.detach())
    if isinstance(x, (list, tuple)) and x and draw.chance(0.6):
        return _spoilt_list(draw, list(x))
    return absurd(draw)


def absurd(draw: Draw) -> object:
    """An object of any type."""
    return draw.pick(
        None, True, *INTEGERS, *NUMBERS, "x", "", "cpu", "bshd", b"x", [], (), {}, set(), [[1]],
        [None], (1, 2, 3), (0, 1), ("a", "b"), (None, -1), (2**40, 2**70), 1j, object(), print,
        torch.float32,
        np.int64(3), np.float32(0.5), np.zeros((2, 2)), np.array(1), HeadMap([0]), [0.5], [2**70],
        torch.tensor(3), torch.tensor([]), torch.zeros(0, 0), torch.zeros(1, 1, 1, 1),
        torch.zeros(2, 3, 4, 5), torch.tensor(2**62), torch.tensor(math.nan), torch.ones(1),
    )  # fmt: skip


def _spoilt_list(draw: Draw, x: list) -> list:
    kind = draw.pick("shorter", "longer", "entry", "nested")
    if kind == "shorter":
        return x[1:]
    if kind == "longer":
        return [*x, x[0]]
    if kind == "nested":
        return [x]
    x[draw.integer(0, len(x) - 1)] = absurd(draw)
    return x


def _shape(draw: Draw, x: Tensor) -> Tensor:
    dim = draw.integer(0, max(0, x.dim() - 1))
    kind = draw.pick("more", "less", "squeeze", "unsqueeze", "flat", "swap", "empty", "longer")
    if kind == "unsqueeze" or x.dim() == 0:
        return x[None]
    if kind == "less" and x.shape[dim]:
        return x.narrow(dim, 0, x.shape[dim] - 1)
    if kind == "more" and x.shape[dim]:
        return torch.cat([x, x.narrow(dim, 0, 1)], dim)
    if kind == "squeeze" and x.shape[dim]:
        return x.select(dim, 0)
    if kind == "flat":
        return x.flatten()
    if kind == "swap":
        return x.transpose(dim, draw.integer(0, x.dim() - 1))
    if kind == "longer" and x.shape[dim]:
        return x.narrow(dim, 0, 1).expand(*x.shape[:dim], 2**33, *x.shape[dim + 1 :])
    return x.new_empty([n if i != dim else 0 for i, n in enumerate(x.shape)])


def _dtype(draw: Draw, x: Tensor) -> Tensor:
    return x.to(getattr(torch, draw.pick(*DTYPE_NAMES)))


def _values(draw: Draw, x: Tensor) -> Tensor:
    if (x.dtype.is_floating_point or x.dtype.is_complex) and x.dtype.itemsize > 1:
        return draw.place(torch.full(x.shape, draw.pick(*NUMBERS), dtype=torch.float64).to(x.dtype))
    if x.dtype.itemsize == 1 or x.dtype == torch.uint16:  # torch can do little with them
        return draw.place(torch.zeros(x.shape).to(x.dtype))
    limits = torch.iinfo(x.dtype)
    extreme = draw.pick(limits.min, limits.max, -1, 0, limits.max - 5, limits.min + 5, 1 << 20)
    found = x.clone().contiguous()
    flat = found.view(-1)
    if not flat.numel():
        return found
    kind = draw.pick("one", "all", "flip", "random")
    if kind == "one":
        flat[draw.integer(0, flat.numel() - 1)] = extreme
    elif kind == "all":
        flat.fill_(extreme)
    elif kind == "flip":
        flat.copy_(flat.flip(0))
    else:
        flat.copy_(draw.integers(limits.min, limits.max - 1, flat.numel()))
    return draw.place(found)


def _kind(draw: Draw, x: Tensor) -> object:
    kind = draw.pick("meta", "sparse", "grad", "numpy", "list", "strided", "parameter", "negative")
    if kind == "meta":
        return x.to("meta")
    if kind == "sparse":
        has_sparse = x.dtype.itemsize > 1 and x.dtype != torch.uint16
        return x.to_sparse() if has_sparse else x.to("meta")
    if kind == "grad" and x.dtype.is_floating_point and x.dtype.itemsize > 1:
        return x.clone().requires_grad_()
    if kind == "numpy" and x.dtype in (torch.float32, torch.int32, torch.int64):
        return x.numpy()
    if kind == "list":
        return x.tolist() if x.numel() < 1000 else []
    if kind == "parameter" and x.dtype.is_floating_point and x.dtype.itemsize > 1:
        return torch.nn.Parameter(x.clone())
    if kind == "negative" and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch._neg_view(x)
    return x[..., None].expand(*x.shape, 2)[..., 0] if x.dim() else x


SPOIL_TENSOR: tuple[Callable, ...] = (_shape, _shape, _dtype, _values, _values, _kind)


def run_hostile(call: Call) -> None:
    """An error of another type passes through; one without a message is an AssertionError."""
    try:
        call.function(**call.arguments)
    except EXPECTED_ERRORS as error:
        assert str(error).strip(), f"{type(error).__name__} without a message"
    except MemoryError:
        pass
    except RuntimeError as error:
        # Torch's MemoryError. Its stable C++ interface replaces the message by the failed call.
        if not any(text in str(error) for text in ("can't allocate memory", "aten::new_empty")):
            raise
