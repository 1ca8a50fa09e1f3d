"""HeadMap: which KV head each query head reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch

from .native.arguments import as_device, as_int, check_tensors, shown
from .partition import Groups, assign

MAX_HEADS = 1 << 20  # of a map; far above any model, and small enough to list
MAX_COST = 1 << 30  # of a head in a shard: sums over MAX_HEADS fit into 64 bits
_CPU = "cpu"  # as a key: a string is found faster than a torch.device


@dataclass(frozen=True)
class HeadMapShard:
    """One rank's part of a head map under tensor parallelism.

    Attributes:
        head_map: the map among the rank's own heads (both numbered from 0).
        query_heads: global index of each local query head, ascending.
        kv_heads: global index of each local KV head (key head), ascending.
        value_head_map: the local map of V if it differs from K's, else None.
        value_heads: global index of each local value head; ``kv_heads`` if the map is shared.

    Examples:
        >>> from gqa_kernels import HeadMap
        >>> shard = HeadMap.from_group_sizes([3, 1, 2]).shard(rank=0, world=2)
        >>> len(shard.query_heads) == shard.head_map.num_heads
        True
    """

    head_map: HeadMap
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    value_head_map: HeadMap | None
    value_heads: tuple[int, ...]


@final
class HeadMap:
    """Immutable, hashable map from query head to KV head.

    Args:
        entries: ``Hq`` integers, ``entries[h]`` = KV head that query head ``h`` reads. Groups may
            be uneven, interleaved, of size 1 or empty.
        num_kv_heads: ``Hkv``; default ``max(entries) + 1``. Give it if trailing KV heads are
            read by no query head.

    Attributes:
        num_kv_heads: ``Hkv``.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: the map is empty, an entry lies outside ``[0, num_kv_heads)``, or there are more
            than ``MAX_HEADS`` heads.

    Examples:
        >>> from gqa_kernels import HeadMap
        >>> head_map = HeadMap([0, 3, 0, 1, 2])
        >>> head_map.groups
        ((0, 2), (3,), (4,), (1,))
        >>> HeadMap.from_group_sizes([3, 1, 2])
        HeadMap([0, 0, 0, 1, 2, 2], num_kv_heads=3)
    """

    _entries: tuple[int, ...]
    num_kv_heads: int
    _tensors: dict[object, torch.Tensor]

    def __init__(self, entries: Iterable[int], num_kv_heads: int | None = None):
        entries = checked_entries("head_map", entries)
        if num_kv_heads is None:
            num_kv_heads = max(entries) + 1
        num_kv_heads = as_int("num_kv_heads", num_kv_heads)
        _check_count("num_kv_heads", num_kv_heads)
        if num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be at least 1, got {num_kv_heads}")
        for h, e in enumerate(entries):
            if not 0 <= e < num_kv_heads:
                raise ValueError(
                    f"head_map entries must lie in [0, {num_kv_heads}), got {e} at head {h}"
                )
        # Not through __dict__, which Dynamo of torch 2.10 can't trace.
        object.__setattr__(self, "_entries", entries)
        object.__setattr__(self, "num_kv_heads", num_kv_heads)
        object.__setattr__(self, "_tensors", {})

    @classmethod
    def uniform(cls, num_heads: int, num_kv_heads: int) -> HeadMap:
        """The map of ordinary GQA: ``h // (num_heads / num_kv_heads)``."""
        num_heads = as_int("num_heads", num_heads)
        num_kv_heads = as_int("num_kv_heads", num_kv_heads)
        _check_count("num_heads", num_heads)
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a positive multiple of num_kv_heads ({num_kv_heads}), "
                f"got {num_heads}"
            )
        ratio = num_heads // num_kv_heads
        return cls((h // ratio for h in range(num_heads)), num_kv_heads)

    @classmethod
    def from_group_sizes(cls, sizes: Sequence[int]) -> HeadMap:
        """Contiguous groups: ``[3, 1, 2]`` gives ``[0, 0, 0, 1, 2, 2]``. A size may be 0."""
        sizes = [_as_entry("sizes", g, s) for g, s in enumerate(bounded("sizes", sizes))]
        if min(sizes, default=0) < 0:
            raise ValueError(f"sizes must be non-negative, got {shown(sizes)}")
        _check_count("the sum of sizes", sum(sizes))
        return cls((g for g, size in enumerate(sizes) for _ in range(size)), len(sizes))

    @classmethod
    def from_groups(cls, groups: Sequence[Iterable[int]]) -> HeadMap:
        """``[[0, 2], [1]]`` gives ``[0, 1, 0]``; every head must appear exactly once."""
        groups = [
            sorted(_as_entry(f"groups[{g}]", i, h) for i, h in enumerate(bounded("groups", group)))
            for g, group in enumerate(bounded("groups", groups))
        ]
        heads = sorted(h for group in groups for h in group)
        if heads != list(range(len(heads))):
            raise ValueError(f"groups must hold each of the query heads once, got {shown(groups)}")
        entries = [0] * len(heads)
        for g, group in enumerate(groups):
            for h in group:
                entries[h] = g
        return cls(entries, len(groups))

    @property
    def entries(self) -> tuple[int, ...]:
        return self._entries

    @property
    def num_heads(self) -> int:
        """``Hq``."""
        return len(self._entries)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Query heads of each KV head, ascending."""
        groups: list[list[int]] = [[] for _ in range(self.num_kv_heads)]
        for h, e in enumerate(self._entries):
            groups[e].append(h)
        return tuple(map(tuple, groups))

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.groups))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether this is the map that ordinary GQA kernels compute: equal, contiguous groups."""
        ratio, rest = divmod(self.num_heads, self.num_kv_heads)
        return rest == 0 and all(e == h // ratio for h, e in enumerate(self._entries))

    def cached(self, key: object, build: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``build()``, kept per key.

        While torch.compile traces, or under a dispatch mode (FakeTensorMode, say), nothing is kept:
        such a tensor has no values, or belongs to the mode. FakeTensorMode refuses real tensors, so
        that under a mode nothing kept is used either.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._len_torch_dispatch_stack():
            return build()
        found = self._tensors.get(key)
        if found is None:
            if not compiling and torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # what is kept may be needed in training later
                    found = build()
            else:
                found = build()
            if not compiling and type(found) is torch.Tensor:
                self._tensors[key] = found
        return found

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The entries as an int32 tensor ``[Hq]``, built once per device. Don't modify it."""
        device = as_device(device)
        return self.cached(
            _CPU if device.type == _CPU else device,
            lambda: torch.tensor(self._entries, dtype=torch.int32, device=device),
        )

    @property
    def cpu_tensor(self) -> torch.Tensor:
        """:meth:`tensor` on the CPU; for calls without a tensor subclass or dispatch mode."""
        found = self._tensors.get(_CPU)
        return self.tensor() if found is None else found

    def shard(
        self,
        rank: int,
        world: int,
        *,
        value_head_map: HeadMap | None = None,
        query_cost: int = 1,
        kv_cost: int = 1,
    ) -> HeadMapShard:
        """Rank ``rank``'s part when the query heads are split across ``world`` ranks.

        Every rank gets complete query heads and only the KV heads that they read. KV heads that no
        query head reads are left out. The split minimises the largest load of a rank, then
        the total number of KV heads stored. It is proven optimal
        (:mod:`gqa_kernels.partition`), and is the same on every rank.

        Args:
            rank, world: this rank and the number of ranks, at most ``Hq``.
            value_head_map: the map of V, if it differs.
            query_cost, kv_cost: load of a query head and of a KV head (a K and a V head). The
                default counts the rows of the projections; long contexts weigh ``kv_cost`` more.

        Raises:
            ValueError: ``rank`` or ``world`` is out of range, a cost is negative, or the maps
                differ in length.
            ImportError: no simple cut is optimal and SciPy is missing.
        """
        rank, world = as_int("rank", rank), as_int("world", world)
        query_cost, kv_cost = as_int("query_cost", query_cost), as_int("kv_cost", kv_cost)
        if value_head_map is not None and not isinstance(value_head_map, HeadMap):
            raise TypeError(
                f"value_head_map must be a HeadMap or None, got {shown(value_head_map)}"
            )
        if world < 1 or world > self.num_heads:
            raise ValueError(f"world must lie in [1, {self.num_heads}], got {world}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}), got {rank}")
        if not 1 <= query_cost <= MAX_COST or not 0 <= kv_cost <= MAX_COST:
            raise ValueError(
                f"query_cost must be at least 1 and kv_cost at least 0, and both at most "
                f"{MAX_COST}, got {query_cost}, {kv_cost}"
            )
        maps = [self] if value_head_map is None else [self, value_head_map]
        if maps[-1].num_heads != self.num_heads:
            raise ValueError(
                f"value_head_map must have {self.num_heads} entries, got {maps[-1].num_heads}"
            )
        alike: dict[tuple[int, ...], list[int]] = {}  # what heads read -> the heads
        for h, reads in sorted(enumerate(zip(*maps, strict=True)), key=lambda item: item[1]):
            alike.setdefault(reads, []).append(h)
        # A shared map's KV head is one K and one V head.
        groups = Groups(
            sizes=tuple(map(len, alike.values())),
            reads=tuple(_renumbered(kind) for kind in zip(*alike, strict=True)),
            query_cost=2 * query_cost,
            read_cost=2 * kv_cost // len(maps),
        )
        query_heads = []
        for heads, counts in zip(alike.values(), assign(groups, world), strict=True):
            before = sum(counts[:rank])
            query_heads += heads[before : before + counts[rank]]
        query_heads.sort()
        local_maps, held = zip(*(m._restricted(query_heads) for m in maps), strict=True)
        return HeadMapShard(
            local_maps[0],
            tuple(query_heads),
            held[0],
            None if value_head_map is None else local_maps[1],
            held[-1],
        )

    def _restricted(self, query_heads: Sequence[int]) -> tuple[HeadMap, tuple[int, ...]]:
        """The map among some query heads and the KV heads that they read, which come second."""
        kv_heads = tuple(sorted({self._entries[h] for h in query_heads}))
        local = {kv: i for i, kv in enumerate(kv_heads)}
        return HeadMap((local[self._entries[h]] for h in query_heads), len(kv_heads)), kv_heads

    def to_json(self) -> str:
        return json.dumps({"entries": self._entries, "num_kv_heads": self.num_kv_heads})

    @classmethod
    def from_json(cls, text: str) -> HeadMap:
        if not isinstance(text, (str, bytes, bytearray)):
            raise TypeError(f"HeadMap JSON must be a string, got {shown(text)}")
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"HeadMap JSON must be valid, got {shown(text)}: {error}") from None
        except RecursionError:
            raise ValueError("HeadMap JSON must be an object of numbers, got a deep nest") from None
        if not isinstance(data, dict) or set(data) != {"entries", "num_kv_heads"}:
            raise ValueError(
                f"HeadMap JSON must be an object with entries and num_kv_heads, got {shown(text)}"
            )
        return cls(data["entries"], data["num_kv_heads"])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"HeadMap is immutable: cannot set {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadMap):
            return NotImplemented
        return self._entries == other._entries and self.num_kv_heads == other.num_kv_heads

    def __hash__(self) -> int:
        return hash((self._entries, self.num_kv_heads))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, head: int) -> int:
        return self._entries[head]

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __reduce__(self) -> tuple[type[HeadMap], tuple[tuple[int, ...], int]]:
        return (HeadMap, (self._entries, self.num_kv_heads))

    def __repr__(self) -> str:
        return f"HeadMap({list(self._entries)}, num_kv_heads={self.num_kv_heads})"


def _renumbered(indices: Iterable[int]) -> tuple[int, ...]:
    """The indices numbered from 0 without gaps, in ascending order."""
    indices = tuple(indices)
    numbers = {index: n for n, index in enumerate(sorted(set(indices)))}
    return tuple(numbers[index] for index in indices)


def bounded(name: str, values: Iterable) -> Iterator:
    """The values, of which there may be ``MAX_HEADS`` at most: an iterable may have no end."""
    if isinstance(values, torch.Tensor):
        check_tensors(**{name: values})
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence, got {shown(values)}")
    try:
        iterator = iter(values)
    except TypeError:  # a 0-d array
        raise TypeError(f"{name} must be a sequence, got {shown(values)}") from None
    for count, value in enumerate(iterator):
        _check_count(f"len({name})", count + 1)
        yield value


def checked_entries(name: str, entries: Iterable[int]) -> tuple[int, ...]:
    """The entries of a map as integers, of which there must be one."""
    entries = tuple(_as_entry(name, h, e) for h, e in enumerate(bounded(name, entries)))
    if not entries:
        raise ValueError(f"{name} must have at least one entry, got none")
    return entries


def _check_count(name: str, count: int) -> None:
    if count > MAX_HEADS:
        raise ValueError(f"{name} must be at most {MAX_HEADS}, got {count}")


def _as_entry(name: str, index: int, value: object) -> int:
    try:
        return as_int(name, value)
    except TypeError:
        raise TypeError(
            f"{name} entries must be integers, got {shown(value)} at index {index}"
        ) from None
