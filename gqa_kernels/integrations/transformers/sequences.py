"""SequenceTable: the pages of a batch's tokens, for all layers that keep the same tokens.

transformers counts positions: column ``p`` of a mask is the ``p``-th token that the model got,
padding included, and all rows of a batch have as many. A page table has sequences of different
lengths. Each row here keeps its positions from ``start`` on. So left padding and tokens behind a
sliding window take no memory, and decode needs lengths but no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...cache.allocator import PageAllocator
from ...cache.view import KVView
from .masks import SequenceMask

SPARE = 8  # a full pool grows by an eighth of itself


@dataclass
class Step:
    """New tokens of a batch, the same for every layer of the table.

    Attributes:
        before: positions before this step.
        new: positions of the step, ``S``.
        page_table: int32 ``[B, max_pages]``, the pages of the new tokens included.
        lengths: int32 ``[B]``, stored tokens before the step.
        lengths_after: int32 ``[B]``, stored tokens after the step.
        copies: pages to copy before they are written, ``(from, to)``.
        kept: bool ``[B, S]``, the new tokens to store; None: all of them.
        start: int64 ``[B]``, position of each row's first stored token; None: 0 in all.
        window: positions that a query sees, its own included; None: all.
        views: by shape of the pool, a layer's views before and after its append.
    """

    before: int
    new: int
    page_table: Tensor
    lengths: Tensor
    lengths_after: Tensor
    copies: tuple[tuple[int, int], ...]
    kept: Tensor | None
    start: Tensor | None
    window: int | None
    views: dict[object, tuple[KVView, KVView]] = field(default_factory=dict)
    _translated: tuple[Tensor, Tensor | None] | None = None

    def mask(self, given: Tensor, capacity: int, queries: int) -> Tensor | None:
        """A mask of transformers, over the stored keys.

        Args:
            given: ``[B or 1, H or 1, queries or 1, positions]``, boolean or additive.
            capacity: slots of a row.
            queries: the last tokens of the step, which attend.

        Returns:
            None if it shows just what causality, the window and ``start`` show; otherwise
            ``[B, H or 1, queries or 1, capacity]`` with column ``j`` for a row's ``j``-th stored
            key.

        Raises:
            ValueError: it lacks columns, or shows a position that is not stored.
        """
        known = self._translated
        if known is None or known[0] is not given:  # layers share one
            known = self._translated = (given, self._translate(given, capacity, queries))
        return known[1]

    def _translate(self, given: Tensor, capacity: int, queries: int) -> Tensor | None:
        after = self.before + self.new
        if given.shape[-1] < after:
            raise ValueError(
                f"attention_mask must have a column for each of {after} positions, got shape "
                f"{tuple(given.shape)}"
            )
        given = given[..., :after]
        column = torch.arange(after, device=given.device)
        row = column[after - queries :, None]
        usual = column <= row
        if self.window is not None:
            usual = usual & (column > row - self.window)
        visible = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min
        if self.start is not None:
            stored = column >= self.start[:, None, None, None]
            if bool((visible & ~stored).any()):
                raise ValueError(
                    "attention_mask must hide what a PagedCache does not store (left padding of "
                    "the first call, tokens behind the sliding window), got one that shows it"
                )
            usual = usual & stored
        if given.dtype == torch.bool and bool((given == usual).all()):
            return None
        if self.start is None:
            return torch.nn.functional.pad(given, (0, capacity - after))
        batch = len(self.start)
        slot = torch.arange(capacity, device=given.device)
        position = (self.start[:, None] + slot).clamp(max=after - 1)[:, None, None]
        given = given.expand(batch, *given.shape[1:])
        return given.gather(3, position.expand(*given.shape[:3], capacity))


class SequenceTable:
    """Positions and pages of the rows of a batch.

    Args:
        page_size: tokens of a page.
        num_pages: pages of the pools; None: they grow.
        window: positions that a query sees, its own included; older tokens are dropped, by whole
            pages.

    Attributes:
        positions: passed so far, padding included; the same for all rows.
        allocator: assigns pages to rows; every layer has as many pages.
        current: the last step.
        keep_past: drop only what was behind the window at the last :meth:`crop`. Assisted
            generation crops after every call to roll back.
    """

    def __init__(self, page_size: int, num_pages: int | None, window: int | None):
        self.allocator = PageAllocator(num_pages or 0, page_size)
        self.grows = num_pages is None
        self.window = window
        self.positions = 0
        self.keep_past = False
        self._settled = 0  # positions at the last crop
        self._names: list[int] = []
        self._start: list[int] = []  # of each row
        self._padding: list[int] = []
        self.current: Step | None = None

    @property
    def batch(self) -> int:
        return len(self._names)

    def step(
        self, seen: int, batch: int, new: int, mask: Tensor | None, device: torch.device
    ) -> Step:
        """The step of a layer; the first layer with new tokens begins it.

        Args:
            seen: positions that the layer has.
            batch, new: rows and positions of the layer's new keys.
            mask: transformers' mask for them, which shows left padding.

        Raises:
            ValueError: the layer does not continue what the others have, or the batch is another.
            OutOfPages: a pool of fixed size is full; nothing was stored.
        """
        if self._names and batch != self.batch:
            raise ValueError(f"the batch must stay {self.batch}, as the cache has it, got {batch}")
        if seen == self.positions:
            self.current = self._begin(batch, new, mask, device)
        elif self.current is None or (seen, new) != (self.current.before, self.current.new):
            raise ValueError(
                f"layers must be given the same tokens, got {new} after {seen} where others have "
                f"{self.positions}"
            )
        return self.current

    def crop(self, positions: int) -> None:
        """Keep the first ``positions`` only.

        Raises:
            ValueError: tokens behind the window, which are gone, would be seen again.
        """
        if self.window is not None:
            first = positions - self.window + 1
            for start, padding in zip(self._start, self._padding, strict=True):
                if start > max(first, padding):
                    raise ValueError(
                        f"crop: position {max(first, padding)} must still be stored to go on after "
                        f"{positions}, got a cache that has dropped all before {start} (call "
                        "activate_past_recording() first)"
                    )
        for row, name in enumerate(self._names):
            self.allocator.truncate(name, max(positions - self._start[row], 0))
            self._start[row] = min(self._start[row], positions)
        self.positions = self._settled = min(self.positions, positions)

    def select(self, rows: Sequence[int]) -> None:
        """Make row ``i`` a copy of what row ``rows[i]`` was; pages are shared until written."""
        if list(rows) == list(range(self.batch)):
            return
        names = [self.allocator.fork(self._names[row]) for row in rows]
        for name in self._names:
            self.allocator.free(name)
        self._names = names
        self._start = [self._start[row] for row in rows]
        self._padding = [self._padding[row] for row in rows]

    def clear(self) -> None:
        """Forget all rows; pools keep their size."""
        for name in self._names:
            self.allocator.free(name)
        self._names, self._start, self._padding = [], [], []
        self.positions, self._settled, self.current = 0, 0, None

    def _begin(self, batch: int, new: int, mask: Tensor | None, device: torch.device) -> Step:
        before = self.positions
        counts = [new] * batch
        kept = None
        if not self._names:
            self._padding = _left_padding(mask, batch, new)
            first = 0 if self.window is None or self.keep_past else max(new - self.window + 1, 0)
            start = [max(padding, first) for padding in self._padding]
            counts = [new - position for position in start]
            names = [self.allocator.allocate() for _ in range(batch)]
        else:
            names, start = self._names, self._drop_old()
        self._make_room(names, counts)
        found = self.allocator.append(names, counts)
        self._names, self._start = names, start
        self.positions += new
        started = torch.tensor(start, device=device) if any(start) else None
        if not before and started is not None:
            kept = torch.arange(new, device=device) >= started[:, None]
        lengths = found.lengths.to(device)
        added = new if kept is None else kept.sum(1, dtype=torch.int32)
        return Step(
            before, new, found.page_table.to(device), lengths, lengths + added, found.copies, kept,
            started, self.window,
        )  # fmt: skip

    def _drop_old(self) -> list[int]:
        """Forget whole pages behind the window of the next query; where each row starts then."""
        start = list(self._start)
        if self.window is None:
            return start
        page_size = self.allocator.page_size
        first = (self._settled if self.keep_past else self.positions) - self.window + 1
        for row, name in enumerate(self._names):
            behind = first - start[row]
            if behind >= page_size:
                dropped = behind // page_size * page_size
                self.allocator.discard(name, dropped)
                start[row] = self._start[row] = start[row] + dropped
        return start

    def _make_room(self, names: list[int], counts: list[int]) -> None:
        missing = self.allocator.pages_needed(names, counts) - self.allocator.num_free_pages
        if missing > 0 and self.grows:
            self.allocator.grow(max(missing, self.allocator.num_pages // SPARE))


def _left_padding(mask: Tensor | None, batch: int, new: int) -> list[int]:
    """How many of the first positions no query sees, of each row, by a boolean mask."""
    if mask is None or isinstance(mask, SequenceMask) or mask.dtype != torch.bool:
        return [0] * batch
    seen = mask[..., :new].any(1).any(1)  # [B or 1, S]
    hidden = (~seen).cumprod(-1).sum(-1).expand(batch)
    return hidden.tolist()
