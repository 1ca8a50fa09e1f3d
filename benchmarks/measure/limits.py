"""What the machine allows, measured in the same run: bytes per second and operations per second.

On a CPU the memory limit is a streaming read by as many threads as torch has, over a working set as
large as the case's, so a set that fits a cache is compared with the cache's rate. The C library's
memchr reads it, which does little besides loading and lets Python's threads run side by side. On a
GPU it is a device-to-device copy far larger than the caches, counting bytes read and written.

The compute limit is a large matrix product in the case's type. On a CPU the fp32 rate counts where
it is higher, since any processor can widen its operands.
"""

from __future__ import annotations

import ctypes
import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch

SMALLEST_READ = 1 << 16  # bytes; smaller reads would measure the start of the threads
LARGEST_READ = 1 << 28  # bytes; far beyond any last-level cache
READ_SECONDS = 0.03
FILL, ABSENT = 0xAA, 0x55
COPY_BYTES = 1 << 30
GPU_PRODUCT = 8192  # rows, columns and depth of the matrix product
CPU_PRODUCTS = (256, 512, 1024)  # the larger ones only where they are done soon:
PRODUCT_SECONDS = 0.1  # torch has no fast product for some types on some processors
REPEATS = 5


class Limits:
    """Measures a limit when it is first requested."""

    def __init__(self, device: torch.device):
        self.device = device
        self._memory: dict[int, float] = {}
        self._compute: dict[str, float] = {}

    def bytes_per_second(self, working_set: float) -> float:
        """Memory limit for data of so many bytes."""
        if self.device.type != "cpu":
            size = COPY_BYTES
        else:
            clamped = min(max(working_set, SMALLEST_READ), LARGEST_READ)
            size = 1 << round(math.log2(clamped))
        if size not in self._memory:
            measure = _streaming_read if self.device.type == "cpu" else _device_copy
            self._memory[size] = measure(size)
        return self._memory[size]

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Compute limit for operands of a type."""
        name = str(dtype).removeprefix("torch.")
        if name not in self._compute:
            rate = _matrix_product(dtype, self.device)
            if self.device.type == "cpu" and dtype != torch.float32:
                rate = max(rate, self.flops_per_second(torch.float32))
            self._compute[name] = rate
        return self._compute[name]

    def to_json(self) -> dict:
        return {
            "memory": [{"bytes": n, "rate": self._memory[n]} for n in sorted(self._memory)],
            "compute": dict(sorted(self._compute.items())),
        }


def _streaming_read(size: int) -> float:
    """Bytes per second of all threads reading parts of one buffer, the best of a few tries."""
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    threads = torch.get_num_threads()
    buffer = torch.full((size,), FILL, dtype=torch.uint8)
    part = size // threads

    def read(thread: int, passes: int) -> None:
        start = buffer.data_ptr() + thread * part
        for _ in range(passes):
            libc.memchr(start, ABSENT, part)

    passes, best = 1, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            started = time.perf_counter()
            list(pool.map(read, range(threads), [passes] * threads))
            seconds = time.perf_counter() - started
            best = max(best, passes * part * threads / seconds)
            passes = max(passes, min(1 << 12, round(READ_SECONDS / seconds * passes)))
    return best


def _device_copy(size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * size / _device_seconds(lambda: target.copy_(source))


def _matrix_product(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second."""
    if device.type != "cpu":
        a, b = (torch.randn(GPU_PRODUCT, GPU_PRODUCT, device=device).to(dtype) for _ in range(2))
        return 2 * GPU_PRODUCT**3 / _device_seconds(lambda: a @ b)
    best = 0.0
    for n in CPU_PRODUCTS:
        if best and 2 * n**3 / best > PRODUCT_SECONDS:
            break
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def _device_seconds(run) -> float:
    """Seconds of a device operation: the best of a few runs of ten."""
    best = math.inf
    for _ in range(1 + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e4)
    return best
