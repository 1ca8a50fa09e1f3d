"""What every instruction emitter shares: type tables and the registry ``EMITTERS``."""

import numpy as np

from .syntax import TYPE_SIZES

DT = {
    "u1": np.uint8,
    "s1": np.int8,
    "u2": np.uint16,
    "s2": np.int16,
    "f2": np.float16,
    "u4": np.uint32,
    "s4": np.int32,
    "f4": np.float32,
    "u8": np.uint64,
    "s8": np.int64,
    "f8": np.float64,
    "b": np.bool_,
}
TYPE_KIND = {
    "pred": "b",
    "b8": "u1",
    "u8": "u1",
    "s8": "s1",
    "b16": "u2",
    "u16": "u2",
    "s16": "s2",
    "f16": "f2",
    "bf16": "u2",
    "f16x2": "u4",
    "bf16x2": "u4",
    "b32": "u4",
    "u32": "u4",
    "s32": "s4",
    "f32": "f4",
    "tf32": "u4",
    "b64": "u8",
    "u64": "u8",
    "s64": "s8",
    "f64": "f8",
    "f32x2": "u8",
    "b128": "q",
    "e4m3": "u1",
    "e5m2": "u1",
}
REG_KIND = {"pred": "b", 1: "u2", 2: "u2", 4: "u4", 8: "u8", 16: "q"}
ALL, NONE = b"\x01" * 32, b"\x00" * 32
EMITTERS = {}


def op(*names):
    """Register an emitter for PTX opcodes."""

    def deco(f):
        for n in names:
            EMITTERS[n] = f
        return f

    return deco


def itype(ins, default=None):
    """The last type modifier of an instruction."""
    for m in reversed(ins.mods):
        if m in TYPE_SIZES:
            return m
    return default


class Lazy:
    """A register that is element (h, :, e) of an mma accumulator held as a matrix."""

    __slots__ = ("e", "h", "mat")

    def __init__(self, mat, h, e):
        self.mat, self.h, self.e = mat, h, e
