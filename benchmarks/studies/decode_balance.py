"""Decode steps of uneven batches, simulated: how long the device waits for its last thread block.

``python -m benchmarks.studies.decode_balance`` prints, for batches of equal and unequal sequences,
the time with one number of splits for all sequences, the time with the parts that the CUDA and
Triton kernels make of the sequences' lengths, and that of a balanced list of equal parts, longest
first. No GPU.

The model: a device runs ``SLOTS`` thread blocks at once, in order. A block starts with a fixed
latency, then reads its keys. All blocks share the memory's bandwidth; one alone can't use it up.
"""

from __future__ import annotations

import heapq
import math
import random
from itertools import product
from typing import NamedTuple

from gqa_kernels.backends.triton.splits import (
    MIN_BLOCKS_PER_SPLIT,
    blocks_per_part,
    ceil_div,
    choose_parts,
    choose_splits,
)

BANDWIDTH, OF_A_BLOCK, START = 3.0e12, 50e9, 2e-6  # an H100: bytes/s, bytes/s, s
SLOTS = {"cuda": 132 * 3, "triton": 132 * 2}  # thread blocks at once, by the kernels' backend
BLOCK = 64  # keys
KEY_BYTES = 2 * 128 * 2  # K and V of D 128, 16 bits
UNEVEN = (9, 7, 5, 4, 3, 2, 1, 1)
ROWS = 16  # of a tile


class Batch(NamedTuple):
    """Sequences of a decode step: their lengths, what the cache holds at most, group sizes."""

    name: str
    lengths: tuple[int, ...]
    capacity: int
    groups: tuple[int, ...] = (4,) * 8

    @property
    def tiles(self) -> int:
        """Tiles of a sequence: a group has one for each 16 of its heads."""
        return sum(ceil_div(size, ROWS) for size in self.groups)

    @property
    def blocks(self) -> list[int]:
        return [ceil_div(length, BLOCK) for length in self.lengths]


def one_split_count(batch: Batch, slots: int) -> list[int]:
    """Blocks of each thread block, in order: every sequence cut into as many parts."""
    work = (len(batch.lengths) * batch.tiles, ceil_div(batch.capacity, BLOCK), slots)
    splits = choose_splits(*work).num_splits
    return [
        part
        for split in range(splits)
        for blocks in batch.blocks
        for part in [_part(blocks, splits, split)] * batch.tiles
    ]


def by_lengths(batch: Batch, slots: int) -> list[int]:
    """The same, if parts have about equally many blocks. Surplus thread blocks are part of it.
    CUDA and Triton have the same rule (csrc/cuda/sm80/decode/part_rule.h)."""
    blocks_of_one = ceil_div(batch.capacity, BLOCK)
    choice = choose_parts(len(batch.lengths), batch.tiles, blocks_of_one, slots)
    most = blocks_per_part(sum(batch.blocks), choice.even_parts)
    found = []
    for blocks in batch.blocks:
        splits = max(1, ceil_div(blocks, most))
        for split in range(splits):
            found += [_part(blocks, splits, split)] * batch.tiles
    surplus = choice.most_parts * batch.tiles - len(found)
    return found + [0] * surplus


def balanced(batch: Batch, slots: int) -> list[float]:
    """Equal parts, the longest first."""
    share = max(sum(batch.blocks) * batch.tiles / slots, MIN_BLOCKS_PER_SPLIT)
    found = []
    for blocks in batch.blocks:
        splits = max(1, math.ceil(blocks / share))
        found += [blocks / splits] * (splits * batch.tiles)
    return sorted(found, reverse=True)


def _part(blocks: int, splits: int, split: int) -> int:
    chunk = ceil_div(blocks, splits)
    return max(0, min(blocks, (split + 1) * chunk) - split * chunk)


def seconds(parts: list[int] | list[float], slots: int) -> float:
    """How long a device takes for thread blocks with so many blocks of keys, in order."""
    now = progress = 0.0  # progress: bytes that a block which reads all the time has read
    waiting, reading, starting = parts[::-1], [], []
    while waiting or reading or starting:
        while waiting and len(reading) + len(starting) < slots:
            starting.append((now + START, waiting.pop() * BLOCK * KEY_BYTES))
        rate = min(OF_A_BLOCK, BANDWIDTH / len(reading)) if reading else 0.0
        next_start = starting[0][0] if starting else math.inf
        next_end = now + (reading[0] - progress) / rate if reading else math.inf
        then = min(next_start, next_end)
        progress += (then - now) * rate
        now = then
        while starting and starting[0][0] <= now:
            heapq.heappush(reading, progress + starting.pop(0)[1])
        while reading and reading[0] <= progress + 1e-3:
            heapq.heappop(reading)
    return now


def batches() -> list[Batch]:
    """Equal lengths, lengths as chats have them, and one long sequence among short ones."""
    generator = random.Random(1)

    def chat(count: int) -> tuple[int, ...]:
        lengths = (generator.lognormvariate(math.log(2048) - 0.5, 1.0) for _ in range(count))
        return tuple(min(32768, max(16, int(length))) for length in lengths)

    found = [Batch(f"{n} x 8192", (8192,) * n, 8192) for n in (2, 8, 50, 64, 128)]
    found += [Batch(f"{n} lognormal, mean 2048", chat(n), 32768) for n in (8, 32, 64, 128)]
    for n in (16, 64, 128):
        found.append(Batch(f"{n - 1} x 1024, 65536", (1024,) * (n - 1) + (65536,), 131072))
        found.append(Batch(f"32768, {n - 1} x 2048", (32768,) + (2048,) * (n - 1), 131072))
    long = (1024,) * 63 + (65536,)
    found.append(Batch("63 x 1024, 65536, one KV head", long, 131072, (8,)))
    found.append(Batch("63 x 1024, 65536, uneven groups", long, 131072, UNEVEN))
    return found


def main() -> None:
    print("| kernels | sequences | one split count | by lengths | balanced | before | now |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (name, slots), batch in product(SLOTS.items(), batches()):
        ways = (one_split_count, by_lengths, balanced)
        before, now, best = (seconds(way(batch, slots), slots) for way in ways)
        print(
            f"| {name} | {batch.name} | {before * 1e6:.0f} us | {now * 1e6:.0f} us | "
            f"{best * 1e6:.0f} us | {before / best:.2f} | {now / best:.2f} |"
        )


if __name__ == "__main__":
    main()
