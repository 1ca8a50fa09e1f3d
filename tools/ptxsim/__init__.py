"""ptxsim: run and check PTX kernels on a machine without a GPU."""

from .errors import (
    DeadlockError,
    DeviceTrap,
    MemoryFault,
    PtxError,
    PtxSyntaxError,
    RaceError,
    Unsupported,
)
from .launch import Struct, demangle
from .metrics import LaunchReport
from .module import Module
from .tma import TensorMap

__all__ = [
    "DeadlockError",
    "DeviceTrap",
    "LaunchReport",
    "MemoryFault",
    "Module",
    "PtxError",
    "PtxSyntaxError",
    "RaceError",
    "Struct",
    "TensorMap",
    "Unsupported",
    "demangle",
]
