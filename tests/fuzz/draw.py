"""What every kind of call draws from its seed: sizes, maps, values and options."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gqa_kernels import HeadMap

from .memory import Memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 2, 7, 8, 16, 24, 33, 40, 64, 80, 96, 111, 128, 192, 256, 320, 576)


@dataclass
class Call:
    """One call of a public function, and what must hold of its result.

    Attributes:
        function: what is called with ``arguments``.
        check: takes the result; raises AssertionError.
        written: tensors whose memory the call may write.
        names: public names that the call covers.
    """

    function: Callable
    arguments: dict[str, object]
    check: Callable[[object], None]
    names: tuple[str, ...]
    written: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        words = ", ".join(f"{name}={described(x)}" for name, x in self.arguments.items())
        return f"{self.names[-1]}({words})"


def described(x: object) -> str:
    """An argument in few words."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}/{list(x.stride())}"
    text = repr(x)
    return text if len(text) < 80 else f"{text[:77]}..."


class Draw:
    """The random choices of one call.

    Args:
        seed: decides all of them.
    """

    def __init__(self, seed: int):
        self.source = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.source.getrandbits(62))
        self.memory = Memory(self.source)
        self.strided = self.chance(0.4)

    def pick(self, *options):
        return self.source.choice(options)

    def chance(self, p: float) -> bool:
        return self.source.random() < p

    def integer(self, low: int, high: int) -> int:
        """In ``[low, high]``."""
        return self.source.randint(low, high)

    def place(self, x: Tensor, last_dim_free: bool = False, writable: bool = False) -> Tensor:
        """Between guard pages, with random strides in some of the calls."""
        return self.memory.place(x, self.strided and self.chance(0.7), last_dim_free, writable)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * size).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In ``[low, high]``, int64."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def head_dims(self) -> tuple[int, int]:
        """D and Dv."""
        dim = self.pick(*HEAD_DIMS)
        return dim, self.pick(dim, dim, *HEAD_DIMS)

    def head_count(self) -> int:
        return self.pick(1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 37)

    def entries(self, heads: int, kv_heads: int) -> list[int]:
        return [self.integer(0, kv_heads - 1) for _ in range(heads)]

    def given_map(self, entries: list[int], kv_heads: int) -> object:
        """A map in one of the forms that functions take."""
        kind = self.pick("HeadMap", "HeadMap", "list", "tuple", "array", "tensor", "int8")
        if kind == "HeadMap":
            return HeadMap(entries, kv_heads)
        if kind == "list":
            return entries
        if kind == "tuple":
            return tuple(entries)
        if kind == "array":
            return np.array(entries, dtype=self.pick(np.int64, np.int32, np.uint8))
        return torch.tensor(entries, dtype=torch.int8 if kind == "int8" else torch.int64)

    def window(self) -> tuple[int | None, int | None]:
        def side():
            return self.pick(None, 0, 1, 3, self.integer(0, 80), self.integer(0, 400))

        return side(), side()

    def scoring(self, heads: int, batch: int, with_alibi: bool = True) -> dict[str, object]:
        """Options of every attention function, present at random."""
        options: dict[str, object] = {}
        if self.chance(0.3):
            options["scale"] = self.pick(0.3, -0.2, 1.0, 0.0, 0.05)
        if self.chance(0.3):
            options["window"] = self.window()
        if self.chance(0.2):
            options["softcap"] = self.pick(0.5, 2.0, 30.0)
        if with_alibi and self.chance(0.2):
            shape = (heads,) if self.chance(0.5) else (batch, heads)
            options["alibi_slopes"] = self.place(self.normal(*shape).abs() / 4)
        if self.chance(0.25):
            options["sinks"] = self.place(self.normal(heads, size=2.0))
        return options

    def mask(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Boolean or additive; broadcast in some dims, some rows hidden whole."""
        shape = tuple(n if self.chance(0.6) else 1 for n in shape)
        x = self.normal(*shape)
        kind = self.pick("bool", "float", "own")
        if kind == "bool":
            x = x > self.pick(-1.0, 0.0)
            hidden = False
        else:
            hidden = -torch.inf if self.chance(0.7) else torch.finfo(torch.float32).min
            x = x.masked_fill(x > 1.5, hidden)
        if shape[-2] > 2:
            x[..., shape[-2] // 2, :] = hidden
        if kind == "own":
            x = x.to(dtype)
        return self.place(x, last_dim_free=True)

    def key_ranges(self, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
        """``[B, 1 or Hq, Sq, 2]``; some rows see no key."""
        heads = heads if self.chance(0.5) else 1
        ends = self.integers(-3, kv_len + 3, batch, heads, q_len, 2)
        if self.chance(0.8):
            ends = ends.sort(-1).values
        return self.place(ends.to(self.pick(torch.int32, torch.int64)))


def with_ranges(mask: Tensor | None, key_ranges: Tensor | None, keys: int) -> Tensor | None:
    """A mask ``[..., Sq, N]`` that hides what key ranges ``[..., Sq, 2]`` hide, too."""
    if key_ranges is None:
        return mask
    j = torch.arange(keys)
    seen = (key_ranges[..., :1] <= j) & (j < key_ranges[..., 1:])
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def per_sequence(x: Tensor | None, b: int) -> Tensor | None:
    """A batch's slopes, for one sequence."""
    return x if x is None or x.dim() == 1 else x[b]
