"""Predicts the speed of a main loop from its instruction count, with no fitted number.

The model adds two times of a thread block's step: the cycles that the tensor cores need, and the
issue slots that the instructions take (four schedulers, one instruction each per cycle). It assumes
that they do not overlap, which is pessimistic, and that nothing else limits the loop, which is
optimistic. For FlashAttention-3's forward on an H100 it gives 657 TFLOP/s at head dim 128 where
616 to 661 are published; for backward passes it is about a fifth too high.
"""

from __future__ import annotations

from typing import NamedTuple

SCHEDULERS = 4
# mma.sync can't reach more than about two thirds of the tensor cores' rate on Hopper.
MMA_SYNC_RATE = 0.63


class Device(NamedTuple):
    """What the model knows of a GPU."""

    name: str
    processors: int
    clock_hz: float
    flop_per_clock: int  # of one processor, 16-bit inputs, dense


H100 = Device("H100 SXM", 132, 1.755e9, 4096)


def tflops(
    useful_flop: float, executed_flop: float, warp_instructions: float, uses_wgmma: bool,
    device: Device = H100,
) -> float:  # fmt: skip
    """Predicted TFLOP/s of a loop.

    Args:
        useful_flop: what the step is credited with.
        executed_flop: what its matrix instructions compute (a backward may compute S twice).
        warp_instructions: instructions of all warps of the thread block in the step.
        uses_wgmma: whether the products are warp-group instructions; else they are mma.sync.
    """
    clocks = _clocks(executed_flop, warp_instructions, uses_wgmma, device)
    return useful_flop / clocks * device.processors * device.clock_hz / 1e12


def terabytes(
    read_bytes: float, executed_flop: float, warp_instructions: float, device: Device = H100
) -> float:
    """TB/s of K and V at which a decode loop's instructions, on ``mma.sync``, would be the limit.

    Memory is the limit if this is well above the device's bandwidth (3.35 TB/s on an H100).
    """
    clocks = _clocks(executed_flop, warp_instructions, False, device)
    return read_bytes / clocks * device.processors * device.clock_hz / 1e12


def _clocks(flop: float, warp_instructions: float, uses_wgmma: bool, device: Device) -> float:
    """Of one processor, for a step."""
    rate = device.flop_per_clock * (1.0 if uses_wgmma else MMA_SYNC_RATE)
    return flop / rate + warp_instructions / SCHEDULERS
