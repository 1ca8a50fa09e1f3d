"""Appends that the CUDA kernel is tried on, in the emulator and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels.cache.view import KVView
from gqa_kernels.call.append import AppendCall
from tests.cases.attention import UNEVEN
from tests.cases.caches import Kind, empty_cache

SCALES = ("k_scale", "v_scale", "k_zero", "v_zero")
DENSE = Kind()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {16: (16, 24), 64: (64, 64), 128: (128, 64), 256: (256, 200), 59: (59, 33), 12: (12, 4)}


FORMATS = [
    Kind(),
    Kind(16, "packed"),
    Kind(3, "NHD"),
    Kind(5, begin=True),
    Kind(4, format="fp8_e4m3"),
    Kind(4, format="fp8_e5m2"),
    Kind(4, format="int8"),
    Kind(4, format="int8", zeros=True),
    Kind(4, format="int4"),
    Kind(batch_index=True, format="int4", zeros=True),
]


def rotary_table(rotary_dim, positions=50, dtype=torch.float32):
    angle = torch.outer(
        torch.arange(positions), 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    )
    return angle.cos().to(dtype), angle.sin().to(dtype)


def appends(
    kind: Kind = DENSE, dtype=BF16, dim: int = 16, counts=(3, 0, 6), lengths=(3, 0, 7),
    packed: bool = True, rotary_dim: int = 0, interleaved: bool = False, table_dtype=FP32,
    value_heads: int | None = None, skew: int = 0, surplus: int = 0, device: str = "cpu",
) -> AppendCall:  # fmt: skip
    """An append of random tokens to a poisoned cache; the same at every call.

    Args:
        counts: new tokens per sequence; all alike where they are not ``packed``.
        skew: numbers by which the rows of the new tokens miss a multiple of their size.
        surplus: packed tokens of no sequence.
    """
    generator = torch.Generator().manual_seed(5)
    dim, value_dim = SIZES[dim]
    if kind.order == "packed":
        value_dim = dim
    cache = empty_cache(
        kind, len(counts), 20, UNEVEN, dim, value_dim, dtype, device, generator, value_heads
    )
    cache.lengths.copy_(torch.tensor(lengths))

    def tokens(heads, dim):
        rows = (sum(counts) + surplus,) if packed else (len(counts), counts[0])
        room = torch.randn(*rows, heads, dim + skew, generator=generator) * 3
        room[:1] = 0  # rows of zeros have scale 0
        x = room.to(device, dtype)[..., skew:]
        return x if packed else x.transpose(1, 2)

    options = {}
    if packed:
        offsets = torch.tensor([0, *counts]).cumsum(0).to(device)
        options = {"cu_seqlens": offsets, "max_seqlen": max(counts)}
    if rotary_dim:
        cos, sin = (x.to(device) for x in rotary_table(rotary_dim, dtype=table_dtype))
        options |= {"q": tokens(6, dim), "rotary_cos": cos, "rotary_sin": sin,
                    "rotary_interleaved": interleaved}  # fmt: skip
    k, v = tokens(3, dim), tokens(value_heads or 3, value_dim)
    return AppendCall.create(k, v, cache.view(), **options)


def bits(x: Tensor) -> Tensor:
    """The memory of a tensor as integers, so that NaN and zeros of both signs count."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_memory(got: KVView, expected: KVView) -> None:
    """Bit for bit, in used and unused slots; on whatever devices."""
    for name in ("k", "v"):
        x, y = getattr(got, name).cpu(), getattr(expected, name).cpu()
        assert torch.equal(bits(x), bits(y)), name
    for name in SCALES:
        x, y = getattr(got, name), getattr(expected, name)
        if x is not None:  # a NaN has many forms
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=0, atol=0, equal_nan=True, msg=name)


KINDS = {
    str(kind): {"kind": kind, "dtype": FP32 if kind.format else BF16}
    for kind in (*FORMATS, Kind(1), Kind(3, begin=True))
}
SHAPES = {
    "fp16-64": {"dim": 64, "dtype": FP16, "kind": Kind(16, "NHD")},
    "bf16-128-int4": {"dim": 128, "kind": Kind(3, format="int4", zeros=True)},
    "fp16-256-fp8": {"dim": 256, "dtype": FP16, "kind": Kind(4, format="fp8_e4m3"), "skew": 8},
    "fp32-12": {"dim": 12, "dtype": FP32, "counts": (1, 1), "lengths": (0, 9), "packed": False},
    "bf16-odd": {"dim": 59, "skew": 3, "kind": Kind(3)},
    "fp32-odd-int8": {"dim": 59, "dtype": FP32, "kind": Kind(format="int8", zeros=True)},
    "value-heads": {"value_heads": 2, "kind": Kind(4), "packed": False, "counts": (2, 2),
                    "lengths": (5, 0)},
    "surplus": {"surplus": 7, "rotary_dim": 16},
    "nothing": {"counts": (0, 0), "lengths": (3, 0)},
}  # fmt: skip
ROTARY = {
    "half-split": {"dim": 64, "rotary_dim": 64},
    "interleaved": {"dim": 64, "rotary_dim": 64, "interleaved": True},
    "partial": {"dim": 64, "rotary_dim": 32, "packed": False, "counts": (3, 3), "lengths": (9, 0)},
    "partners-in-other-chunks": {"dim": 64, "rotary_dim": 24, "kind": Kind(3, format="int8")},
    "odd": {"dim": 59, "rotary_dim": 58, "skew": 1},
    "odd-interleaved": {"dim": 59, "rotary_dim": 22, "interleaved": True, "dtype": FP16},
    "table-of-16-bits": {"dim": 128, "rotary_dim": 128, "table_dtype": BF16},
    "table-interleaved-16": {
        "dim": 128, "rotary_dim": 64, "table_dtype": FP16, "dtype": FP16, "interleaved": True,
    },
    "fp32": {"dim": 256, "rotary_dim": 256, "dtype": FP32},
    "int4": {"dim": 128, "rotary_dim": 64, "kind": Kind(4, format="int4", zeros=True)},
}  # fmt: skip
CASES = KINDS | SHAPES | ROTARY
