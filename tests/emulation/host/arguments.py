"""The structs that kernels are launched with (``args.h`` and ``config.h`` of each phase)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from ..cuda_params import POINTER, AppendParams, AttentionParams, BackwardParams, Strides


class PageDivider(ctypes.Structure):
    """``gqa::cuda::PageDivider``."""

    _fields_ = (("multiplier", ctypes.c_uint32), ("shift", ctypes.c_uint32))


class DecodeArguments(ctypes.Structure):
    """``gqa::cuda::sm80::DecodeParams``."""

    _fields_ = (
        ("call", AttentionParams),
        ("partial_out", POINTER),
        ("partial_lse", POINTER),
        ("tiles", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("parts", ctypes.c_int),
        ("even_parts", ctypes.c_int64),
        ("most_keys", ctypes.c_int64),
        ("sequence_parts", POINTER),
        ("partial_stride", ctypes.c_int),
        ("elements", ctypes.c_bool),
        ("by_page_size", PageDivider),
    )


class PrefillArguments(ctypes.Structure):
    """``gqa::cuda::sm80::PrefillArgs``."""

    _fields_ = (
        ("call", AttentionParams),
        ("softmax_scale", ctypes.c_float),
        ("elements", ctypes.c_bool),
        ("section_pairs", ctypes.c_int),
        ("by_page_size", PageDivider),
    )


class TensorMap(ctypes.Structure):
    """``RecordedMap`` of fake_cuda.cpp, as long as a ``CUtensorMap``."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("nan_fill", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box_minus_one", ctypes.c_uint8 * 5),
        ("rest", ctypes.c_uint8 * 19),
    )

    @property
    def box(self) -> tuple[int, ...]:
        return tuple(x + 1 for x in self.box_minus_one[: self.rank])


class Schedule(ctypes.Structure):
    """``gqa::cuda::sm90::Schedule``."""

    _fields_ = (
        ("q_blocks", ctypes.c_int),
        ("units", ctypes.c_int),
        ("section", ctypes.c_int),
        ("last_block_first", ctypes.c_bool),
        ("counter", POINTER),
    )


class HopperArguments(ctypes.Structure):
    """``gqa::cuda::sm90::PrefillArguments``."""

    _fields_ = (
        ("q", TensorMap),
        ("k", TensorMap),
        ("v", TensorMap),
        ("out", TensorMap),
        ("call", AttentionParams),
        ("schedule", Schedule),
        ("box_rows", ctypes.c_int),
        ("by_page_size", ctypes.c_uint32 * 2),
    )


class BackwardArguments(ctypes.Structure):
    """``gqa::cuda::sm80::BackwardArgs``."""

    _fields_ = (
        ("params", BackwardParams),
        ("numbers", POINTER),
        ("padded_len", ctypes.c_int64),
        ("number_blocks", ctypes.c_int64),
        ("head_sums", POINTER),
        ("sum_blocks", ctypes.c_int64),
        ("softmax_scale", ctypes.c_float),
        ("elements", ctypes.c_bool),
        ("out_elements", ctypes.c_bool),
        ("section_pairs", ctypes.c_int),
        ("by_value", ctypes.c_bool),
        ("shared", ctypes.c_bool),
    )


class AppendSide(ctypes.Structure):
    """``gqa::cuda::sm80::AppendSide``."""

    _fields_ = (
        ("source", POINTER),
        ("target", POINTER),
        ("source_stride", Strides),
        ("target_stride", Strides),
        ("scale", POINTER),
        ("zero", POINTER),
        ("scale_stride", Strides),
        ("zero_stride", Strides),
        ("dim", ctypes.c_uint32),
        ("source_vectors", ctypes.c_bool),
        ("target_vectors", ctypes.c_bool),
        ("turned", ctypes.c_bool),
        ("dynamic", ctypes.c_bool),
    )


class AppendArguments(ctypes.Structure):
    """``gqa::cuda::sm80::AppendArgs``."""

    _fields_ = (
        ("params", AppendParams),
        ("sides", AppendSide * 3),
        ("rows", ctypes.c_uint32),
        ("heads", ctypes.c_uint32),
        ("lanes", ctypes.c_uint32),
        ("angle_vectors", ctypes.c_bool),
    )


def parse(kind: type, raw: bytes):
    """A struct from the bytes of a launch's argument; a kernel's parameter has its exact size."""
    size = ctypes.sizeof(kind)
    assert len(raw) - size in range(64), f"{kind.__name__} has {size} bytes, the kernel {len(raw)}"
    return kind.from_buffer_copy(raw[:size])


def values(x: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every number in a struct with its dotted name."""
    if isinstance(x, ctypes.Structure):
        for field in x._fields_:
            yield from values(getattr(x, field[0]), f"{name}.{field[0]}" if name else field[0])
    elif isinstance(x, ctypes.Array):
        for i in range(len(x)):
            yield from values(x[i], f"{name}[{i}]")
    else:
        yield name, x or 0  # a null pointer is None


def differences(found: ctypes.Structure, expected: ctypes.Structure, *but: str) -> list[str]:
    """The numbers in which two structs differ, those that ``but`` names left out."""
    return [
        f"{name}: {a}, expected {b}"
        for (name, a), (_, b) in zip(values(found), values(expected), strict=True)
        if a != b and name not in but
    ]
