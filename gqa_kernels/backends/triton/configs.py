"""Tiles and launch choices of the Triton kernels, as data and pure functions of shape and device.

There is no autotuning at run time: it would synchronise with the device, and a result would depend
on what ran before. The tables hold tiles that compile without register spills and fit the shared
memory (tests/backends/test_triton_aot.py checks both).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ...native import env
from .splits import (
    PartChoice,
    SplitChoice,
    ceil_div,
    choose_parts,
    choose_splits,
    split_choice,
)


@dataclass(frozen=True)
class DeviceFacts:
    """What the choices depend on.

    Attributes:
        family: key of the tile tables.
        num_sms: streaming multiprocessors or compute units.
        l2_bytes: size of the L2 cache.
        shared_bytes: shared memory of a multiprocessor.
        registers: of 32 bits, of a multiprocessor.
    """

    family: str
    num_sms: int
    l2_bytes: int
    shared_bytes: int = 100 << 10
    registers: int = 65536


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, and how the kernel is compiled for it.

    Attributes:
        d_columns: most columns of q and k that are multiplied at once.
        dv_columns: most columns of v and out that a program has.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    d_columns: int = 256
    dv_columns: int = 256

    def key_slices(self, shape: Shape) -> int:
        """Programs that share the columns of the gradients of q or k."""
        return ceil_div(shape.head_dim, self.d_columns)

    def value_slices(self, shape: Shape) -> int:
        """Programs that share the columns of out, or of the gradient of v."""
        return ceil_div(shape.value_head_dim, self.dv_columns)


@dataclass(frozen=True)
class Shape:
    """Sizes and kind of a call, all that launch choices may see of it.

    Attributes:
        num_groups: G of the plan.
        q_len, kv_len: the longest of packed sequences.
        itemsize: bytes per element of q.
        modifies_scores: softcap, ALiBi slopes, a mask tensor or dropout are given.
        window_left, window_right: -1 where unbounded.
        has_lengths: sequences have numbers of keys of their own.
        paged_or_quantised: K and V take look-ups of pages, or another type than q's.
    """

    batch: int
    num_heads: int
    num_groups: int
    q_len: int
    kv_len: int
    head_dim: int
    value_head_dim: int
    itemsize: int
    modifies_scores: bool = False
    window_left: int = -1
    window_right: int = -1
    paged_or_quantised: bool = False
    has_lengths: bool = False


@dataclass(frozen=True)
class DecodeConfig:
    """A decode launch: the tile, the row tiles per part, and how keys are cut.

    Attributes:
        splits: of each sequence, without ``parts``.
        parts: of all sequences, if they are cut by their lengths.
    """

    tile: Tile
    num_tiles: int
    splits: SplitChoice
    parts: PartChoice | None = None


INTERPRETER = DeviceFacts("interpreter", num_sms=4, l2_bytes=1 << 20)

_INTERPRETED = {
    **{dim: (Tile(64, 64, 4, 1),) * 2 for dim in (64, 128, 256)},
    512: (Tile(32, 32, 4, 1),) * 2,
}

# (family, bytes per element) -> dim class (the larger padded head dim, at least 64; 512: above 256)
# -> tile of plain calls, and of those that take more registers: with pages or quantised K and V,
# softcap, ALiBi or a mask tensor, or a head dim that is no power of two, whose loads are masked.
PREFILL_TILES: dict[tuple[str, int], dict[int, tuple[Tile, Tile]]] = {
    ("sm80", 2): {
        64: (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2)),
        128: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        512: (Tile(64, 32, 8, 2, 64, 256),) * 2,
    },
    ("sm86", 2): {
        64: (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        512: (Tile(64, 32, 8, 1, 64, 256),) * 2,
    },
    ("sm90", 2): {
        64: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        512: (Tile(64, 32, 8, 2, 64, 256),) * 2,
    },
    ("sm100", 2): {
        64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        128: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        256: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        512: (Tile(64, 32, 4, 1, 64, 256),) * 2,
    },
    ("gfx9", 2): {
        64: (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)),
        128: (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
        256: (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        512: (Tile(64, 32, 4, 1, 64, 256),) * 2,
    },
    **{(family, 4): {
        64: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        128: (Tile(32, 16, 4, 2), Tile(16, 16, 4, 2)),
        256: (Tile(32, 16, 8, 2), Tile(16, 16, 4, 2)),
        512: (Tile(16, 16, 4, 2, 64, 256),) * 2,
    } for family in ("sm80", "sm86", "sm90", "sm100")},
    ("gfx9", 4): {
        64: (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        128: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        256: (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        512: (Tile(32, 16, 4, 1, 64, 256),) * 2,
    },
    ("interpreter", 2): _INTERPRETED,
    ("interpreter", 4): _INTERPRETED,
}  # fmt: skip

# The same for decode; block_m follows from the shape (`decode_block_m`), up to the one here.
DECODE_TILES: dict[tuple[str, int], dict[int, tuple[Tile, Tile]]] = {
    ("sm80", 2): {
        64: (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: (Tile(32, 32, 4, 4), Tile(32, 32, 4, 3)),
        256: (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2)),
        512: (Tile(16, 32, 4, 2, 64, 256),) * 2,
    },
    ("sm86", 2): {
        64: (Tile(64, 64, 4, 3), Tile(32, 64, 4, 2)),
        128: (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
        256: (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        512: (Tile(16, 32, 4, 2, 64, 256),) * 2,
    },
    **{(family, 2): {
        64: (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: (Tile(32, 64, 4, 3), Tile(32, 32, 4, 3)),
        256: (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2)),
        512: (Tile(16, 32, 4, 2, 64, 256),) * 2,
    } for family in ("sm90", "sm100")},
    ("gfx9", 2): {
        64: (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        128: (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
        256: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        512: (Tile(16, 32, 4, 1, 64, 256),) * 2,
    },
    **{(family, 4): {
        64: (Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
        128: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
        256: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
        512: (Tile(16, 16, 4, 2, 64, 256),) * 2,
    } for family in ("sm80", "sm86", "sm90", "sm100")},
    ("gfx9", 4): {
        64: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
        256: (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        512: (Tile(16, 16, 4, 1, 64, 256),) * 2,
    },
    ("interpreter", 2): _INTERPRETED,
    ("interpreter", 4): _INTERPRETED,
}  # fmt: skip

# The same for the two backward kernels: the gradients of K and V, and of Q.
BACKWARD_KV_TILES: dict[tuple[str, int], dict[int, tuple[Tile, Tile]]] = {
    ("sm80", 2): {
        64: (Tile(16, 128, 8, 2), Tile(32, 64, 8, 1)),
        128: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        512: (Tile(16, 32, 8, 1, 256, 256),) * 2,
    },
    ("sm90", 2): {
        64: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
        128: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        512: (Tile(16, 32, 8, 1, 256, 256),) * 2,
    },
    ("sm100", 2): {
        64: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
        128: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        512: (Tile(16, 32, 8, 1, 256, 256),) * 2,
    },
    ("sm86", 2): {
        64: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1)),
        256: (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
        512: (Tile(16, 32, 8, 1, 256, 256),) * 2,
    },
    ("gfx9", 2): {
        64: (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
        128: (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
        256: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
        512: (Tile(16, 32, 4, 1, 256, 256),) * 2,
    },
    **{(family, 4): {
        64: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
        128: (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        512: (Tile(16, 16, 8, 1, 128, 128),) * 2,
    } for family in ("sm80", "sm86", "sm90", "sm100", "gfx9")},
    ("interpreter", 2): _INTERPRETED,
    ("interpreter", 4): _INTERPRETED,
}  # fmt: skip
BACKWARD_Q_TILES: dict[tuple[str, int], dict[int, tuple[Tile, Tile]]] = {
    ("sm80", 2): {
        64: (Tile(128, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        256: (Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
        512: (Tile(32, 16, 8, 1, 256, 256),) * 2,
    },
    ("sm90", 2): {
        64: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        128: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        256: (Tile(64, 32, 8, 2), Tile(32, 16, 8, 2)),
        512: (Tile(32, 16, 8, 1, 256, 256),) * 2,
    },
    ("sm100", 2): {
        64: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
        256: (Tile(64, 32, 8, 2), Tile(32, 16, 8, 2)),
        512: (Tile(32, 16, 8, 1, 256, 256),) * 2,
    },
    ("sm86", 2): {
        64: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
        256: (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
        512: (Tile(32, 16, 8, 1, 256, 256),) * 2,
    },
    ("gfx9", 2): {
        64: (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        128: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        256: (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        512: (Tile(32, 16, 4, 1, 256, 256),) * 2,
    },
    **{(family, 4): {
        64: (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        128: (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        512: (Tile(16, 16, 8, 1, 128, 128),) * 2,
    } for family in ("sm80", "sm86", "sm90", "sm100", "gfx9")},
    ("interpreter", 2): _INTERPRETED,
    ("interpreter", 4): _INTERPRETED,
}  # fmt: skip

REGISTERS = 256  # of a thread, at most
GFX9_MEMORY = (64 << 10, 131072)  # of a compute unit: bytes of shared memory, registers
ALWAYS_PACKED_Q_LEN = 16  # up to here rows are packed whatever the rest of the shape
MAX_PACKED_Q_LEN = 128  # a whole prefill tile: packing can't fill it better
ROW_HEADROOM = 2  # rows of a decode tile over the mean group's, for groups above the mean


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def padded_dim(dim: int) -> int:
    """Columns of a tile that holds ``dim`` columns: a power of two, at least 16 for ``tl.dot``."""
    return max(16, power_of_two(dim))


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a device; fixed ones where the kernels are interpreted."""
    if env.triton_interpreter():
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return DeviceFacts(
            "gfx9", properties.multi_processor_count, properties.L2_cache_size, *GFX9_MEMORY
        )
    if (properties.major, properties.minor) == (8, 0):
        family = "sm80"
    elif properties.major == 9:
        family = "sm90"
    elif properties.major in (10, 11):
        family = "sm100"
    else:
        family = "sm86"
    return DeviceFacts(
        family, properties.multi_processor_count, properties.L2_cache_size,
        properties.shared_memory_per_multiprocessor, properties.regs_per_multiprocessor,
    )  # fmt: skip


def prefill_tile(shape: Shape, facts: DeviceFacts) -> Tile:
    """Tile of a prefill launch."""
    return _lookup(PREFILL_TILES, shape, facts)


def backward_kv_tile(shape: Shape, facts: DeviceFacts) -> Tile:
    """Tile of the launch that writes dK and dV: block_m queries x block_n keys."""
    return _lookup(BACKWARD_KV_TILES, shape, facts)


def backward_q_tile(shape: Shape, facts: DeviceFacts) -> Tile:
    """Tile of the launch that writes dQ."""
    return _lookup(BACKWARD_Q_TILES, shape, facts)


def heads_per_section(shape: Shape, facts: DeviceFacts) -> int:
    """Query heads that run side by side: as many as leave their K and V in half of the L2 cache."""
    bytes_per_head = shape.kv_len * (shape.head_dim + shape.value_head_dim) * shape.itemsize
    return max(1, min(shape.num_heads, facts.l2_bytes // 2 // max(bytes_per_head, 1)))


def prefers_decode(shape: Shape, facts: DeviceFacts) -> bool:
    """Whether the decode kernel (rows of a group packed, split keys) suits the shape better.

    Always for a few query tokens. For up to a prefill tile of them, where tiles of one head would
    stay mostly empty and there are too few of them to fill the device.
    """
    if shape.q_len <= ALWAYS_PACKED_Q_LEN:
        return True
    if shape.q_len > MAX_PACKED_Q_LEN:
        return False
    block_m = prefill_tile(shape, facts).block_m
    tiles = ceil_div(shape.q_len, block_m)
    mostly_empty = 2 * shape.q_len <= tiles * block_m
    return mostly_empty and shape.batch * shape.num_heads * tiles < facts.num_sms


def decode_config(shape: Shape, facts: DeviceFacts, num_splits: int | None = None) -> DecodeConfig:
    """Launch of the decode kernel; ``num_splits`` overrides the heuristic."""
    tile = _lookup(DECODE_TILES, shape, facts)
    tile = replace(tile, block_m=decode_block_m(shape, tile.block_m))
    seen_keys = shape.kv_len
    if shape.window_left >= 0:  # the queries are the last tokens
        seen_keys = min(seen_keys, shape.window_left + shape.q_len)
    num_blocks = ceil_div(seen_keys, tile.block_n)
    rows = shape.q_len * shape.num_heads
    likely_tiles = max(ceil_div(rows, tile.block_m), min(shape.num_groups, shape.num_heads))
    likely_tiles *= tile.value_slices(shape)
    slots = facts.num_sms * programs_per_sm(tile, shape, facts)
    work = (shape.batch * likely_tiles, num_blocks, slots)
    splits = choose_splits(*work) if num_splits is None else split_choice(num_splits, *work)
    parts = None
    if num_splits is None and shape.has_lengths and shape.batch > 1:
        parts = choose_parts(shape.batch, likely_tiles, num_blocks, slots)
    return DecodeConfig(tile, most_row_tiles(shape, tile.block_m), splits, parts)


def programs_per_sm(tile: Tile, shape: Shape, facts: DeviceFacts) -> int:
    """Decode programs that run on one multiprocessor at once: as many as have room for the blocks
    of K and V that are loaded ahead, and for their registers."""
    columns = padded_dim(shape.head_dim) + min(padded_dim(shape.value_head_dim), tile.dv_columns)
    shared_bytes = tile.num_stages * tile.block_n * columns * shape.itemsize
    threads = tile.num_warps * (64 if facts.family == "gfx9" else 32)
    by_registers = facts.registers // (threads * REGISTERS)
    return max(1, min(facts.shared_bytes // shared_bytes, by_registers))


def decode_block_m(shape: Shape, largest: int) -> int:
    """Rows of a decode tile: those of the mean group with some headroom, as maps are uneven."""
    groups = max(1, min(shape.num_groups, shape.num_heads))
    mean_rows = ceil_div(shape.q_len * shape.num_heads, groups)
    headroom = ROW_HEADROOM if groups > 1 else 1
    return max(16, min(largest, power_of_two(headroom * mean_rows)))


def most_row_tiles(shape: Shape, block_m: int) -> int:
    """Row tiles that suffice for every head map of this shape.

    A group of r rows takes ceil(r / block_m) <= (r - 1) // block_m + 1 tiles. At most
    min(G + 1, Hq) groups, with that of the invalid heads, are not empty.
    """
    groups = min(shape.num_groups + 1, shape.num_heads)
    return groups + (shape.q_len * shape.num_heads - groups) // block_m


def _lookup(
    table: dict[tuple[str, int], dict[int, tuple[Tile, Tile]]], shape: Shape, facts: DeviceFacts
) -> Tile:
    padded = padded_dim(shape.head_dim), padded_dim(shape.value_head_dim)
    plain, small = table[facts.family, shape.itemsize][min(max(64, *padded), 512)]
    exact = padded == (shape.head_dim, shape.value_head_dim)
    return plain if exact and not (shape.modifies_scores or shape.paged_or_quantised) else small
