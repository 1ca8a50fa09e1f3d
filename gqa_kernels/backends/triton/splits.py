"""How many parts a decode kernel cuts the keys of a sequence into: pure arithmetic on shapes.

One program per (sequence, row tile) leaves most of a device idle when there are few sequences, so
the keys are split and the partial results merged. More splits fill the device better but cost
scratch traffic and a longer merge. The count depends on shapes and the device only, never on tensor
contents, so that a CUDA graph captured once stays right.

If sequences have lengths, which only the device knows, all of them are cut into parts of about
equally many blocks instead (kernels/parts.py). Here is how many parts there can be.

The rule for split counts is FlashAttention-3's idea (hopper/heuristics.h): the fewest splits whose
last wave of programs is nearly as full as the best one reachable.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SPLITS = 128
MIN_BLOCKS_PER_SPLIT = 2  # fewer, and starting a program costs as much as its work
FULL_ENOUGH = 0.8  # of the slots in use without splitting: splitting can't pay
NEARLY_BEST = 0.85  # of the best wave efficiency
PARTS_PER_SLOT = 2  # cut by lengths: two even out what rounding to whole blocks leaves


@dataclass(frozen=True)
class SplitChoice:
    """The choice and what led to it; print it to see why.

    Attributes:
        num_splits: programs per (sequence, row tile).
        blocks_per_split: key blocks that one of them walks over, at most.
        waves: rounds the device needs, a fraction where the last is not full.
        efficiency: waves / ceil(waves), 1.0 where every round is full.
    """

    num_splits: int
    blocks_per_split: int
    waves: float
    efficiency: float


def choose_splits(num_programs: int, num_blocks: int, num_slots: int) -> SplitChoice:
    """The split count of a decode launch.

    Args:
        num_programs: programs without splitting: sequences x row tiles.
        num_blocks: key blocks that a program walks over without splitting.
        num_slots: programs that the device runs at once.
    """
    choices = [split_choice(1, num_programs, num_blocks, num_slots)]
    if num_programs < FULL_ENOUGH * num_slots:
        most = min(MAX_SPLITS, num_blocks // MIN_BLOCKS_PER_SPLIT)
        for num_splits in range(2, most + 1):
            choice = split_choice(num_splits, num_programs, num_blocks, num_slots)
            if choice.blocks_per_split < choices[-1].blocks_per_split:
                choices.append(choice)
    best = max(choice.efficiency for choice in choices)
    return next(choice for choice in choices if choice.efficiency >= NEARLY_BEST * best)


def split_choice(
    num_splits: int, num_programs: int, num_blocks: int, num_slots: int
) -> SplitChoice:
    """What a given split count means for a launch; arguments as for :func:`choose_splits`."""
    waves = num_programs * num_splits / num_slots
    return SplitChoice(
        num_splits=num_splits,
        blocks_per_split=ceil_div(num_blocks, num_splits),
        waves=waves,
        efficiency=waves / ceil_div(num_programs * num_splits, num_slots) if waves else 1.0,
    )


@dataclass(frozen=True)
class PartChoice:
    """How sequences are cut by their lengths, which only the device knows.

    Attributes:
        even_parts: parts of all sequences, if none were rounded up.
        most_parts: that there can be, whatever the lengths.
        most_blocks: key blocks of a sequence, at most.
    """

    even_parts: int
    most_parts: int
    most_blocks: int


def choose_parts(batch: int, tiles: int, num_blocks: int, num_slots: int) -> PartChoice:
    """The parts of a decode launch whose sequences have lengths.

    Args:
        tiles: programs of a part.
        num_blocks: key blocks of the longest sequence that there may be.
        num_slots: programs that the device runs at once.
    """
    even_parts = max(1, PARTS_PER_SLOT * num_slots // tiles)
    most_of_one = max(1, ceil_div(num_blocks, MIN_BLOCKS_PER_SPLIT))
    return PartChoice(even_parts, min(even_parts + batch, batch * most_of_one), num_blocks)


def blocks_per_part(num_blocks: int, even_parts: int) -> int:
    """Blocks of a part, of the ``num_blocks`` of all sequences."""
    return max(MIN_BLOCKS_PER_SPLIT, ceil_div(num_blocks, even_parts))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
