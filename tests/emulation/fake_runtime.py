"""``fake_cuda.h`` for Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


class FakeEvent(ctypes.Structure):
    """``GqaEvent``."""

    _fields_ = (
        ("kind", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("captured", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("value", ctypes.c_int64),
    )


HOOK: Callable = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(FakeEvent))
