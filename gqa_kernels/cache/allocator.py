"""PageAllocator: which sequence holds which pages of a paged cache. Bookkeeping on the host only.

Pages are counted by how many sequences hold them. A fork shares its parent's pages; the first
append of either into a partly filled page that both hold takes a new page and asks for a copy
(copy-on-write), so that full pages of a common prefix are kept once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..native.arguments import as_int, check_tensors, shown

MAX_PAGES = 2**31 - 1  # page tables hold int32


class OutOfPages(RuntimeError):
    """There are too few free pages. Nothing was changed.

    Examples:
        >>> from gqa_kernels import OutOfPages, PageAllocator
        >>> allocator = PageAllocator(num_pages=1, page_size=16)
        >>> try:
        ...     allocator.append([allocator.allocate()], 17)
        ... except OutOfPages as error:
        ...     print(error)
        2 pages are needed, 1 are free
    """


@dataclass(frozen=True)
class PageBatch:
    """Sequences of one step, for :meth:`gqa_kernels.PagedKVCache.at`.

    Attributes:
        page_table: int32 ``[B, max_pages]``; 0 beyond a sequence's pages.
        lengths: int32 ``[B]``, tokens there are, those about to be appended not counted.
        copies: pages to copy before they are written, as ``(from, to)``.
        next_positions: int32 ``[B]``, position of each sequence's next token, or None: its length,
            because no key of a sequence was dropped by :meth:`PageAllocator.keep`.
    """

    page_table: Tensor
    lengths: Tensor
    copies: tuple[tuple[int, int], ...] = ()
    next_positions: Tensor | None = None


@dataclass
class _Sequence:
    pages: list[int]
    length: int
    dropped: int = 0  # keys that keep() dropped: positions are that much beyond the length


class PageAllocator:
    """Assigns the pages of a cache to sequences, which are named by integers.

    Args:
        num_pages: pages of the cache.
        page_size: tokens of a page.

    With budgets per head, a sequence of the allocator is one head of one sequence: see the batch's
    page table as ``[B, Hk, max_pages]``.

    Examples:
        >>> from gqa_kernels import PageAllocator
        >>> allocator = PageAllocator(num_pages=8, page_size=16)
        >>> sequence = allocator.allocate()
        >>> batch = allocator.append([sequence], 20)  # two pages
        >>> allocator.length(sequence), allocator.num_free_pages
        (20, 6)
    """

    def __init__(self, num_pages: int, page_size: int):
        num_pages, page_size = as_int("num_pages", num_pages), as_int("page_size", page_size)
        if not 0 <= num_pages <= MAX_PAGES or page_size < 1:
            raise ValueError(
                f"num_pages must lie in [0, 2**31) and page_size be at least 1, got {num_pages} "
                f"and {page_size}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages  # sequences that hold each page
        self._sequences: dict[int, _Sequence] = {}
        self._next_name = 0

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Names of the sequences there are, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._find(sequence).length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in the order of its tokens."""
        return tuple(self._find(sequence).pages)

    def allocate(self) -> int:
        """A new sequence without tokens; pages come with :meth:`append`."""
        return self._add(_Sequence([], 0))

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that starts with the first ``length`` tokens (default: all) of another."""
        parent = self._find(sequence)
        length = parent.length if length is None else as_int("length", length)
        if not 0 <= length <= parent.length:
            raise ValueError(
                f"length must lie in [0, {parent.length}], the tokens of sequence {sequence}, "
                f"got {length}"
            )
        pages = parent.pages[: -(-length // self.page_size)]
        for page in pages:
            self._holders[page] += 1
        return self._add(_Sequence(list(pages), length, parent.dropped))

    def append(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> PageBatch:
        """Make room for new tokens and count them.

        Args:
            sequences: names, each at most once.
            tokens: new tokens of each, or of all.

        Returns:
            the batch as the cache's append needs it: lengths before, page table with the new pages.

        Raises:
            OutOfPages: nothing was changed.
        """
        found, counts = self._counted(sequences, tokens)
        self._check_free(self._needed(found, counts))
        copies = []
        for sequence, count in zip(found, counts, strict=True):
            partly_filled = count and sequence.length % self.page_size
            if partly_filled:
                copies += self._unshare(sequence, len(sequence.pages) - 1)
            while len(sequence.pages) * self.page_size < sequence.length + count:
                sequence.pages.append(self._take())
        before = self.batch(sequences)
        for sequence, count in zip(found, counts, strict=True):
            sequence.length += count
        return replace(before, copies=tuple(copies))

    def pages_needed(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> int:
        """Free pages that :meth:`append` of the same would take, copies on write included."""
        return self._needed(*self._counted(sequences, tokens))

    def keep(self, sequences: Sequence[int], lengths: int | Sequence[int]) -> PageBatch:
        """Make the pages that keep a part of a sequence's keys writable, and free the others.

        Run :meth:`gqa_kernels.PagedKVCache.keep` on the cache at this batch before the next append:
        the batch still lists every page, because the kept keys have to be read from the pages that
        are freed. If the kept keys will lie in a page that another sequence uses too, that page is
        copied.

        Args:
            sequences: names, each at most once.
            lengths: keys that each of them, or all, will have.

        Returns:
            the batch before the keys are moved.

        Raises:
            ValueError: a length exceeds that of its sequence.
            OutOfPages: there are too few pages for the copies; nothing was changed.

        Example::

            batch = allocator.keep([name], 256)
            cache = pool.at(batch)
            cache.keep(kept)                     # [1, 256] or [1, Hk, 256]
        """
        found, counts = self._counted(sequences, lengths, "lengths")
        for name, sequence, count in zip(sequences, found, counts, strict=True):
            if count > sequence.length:
                raise ValueError(
                    f"lengths must be at most that of each sequence, got {count} for sequence "
                    f"{name} of {sequence.length}"
                )
        written = [
            range(-(-count // self.page_size)) if count < sequence.length else range(0)
            for sequence, count in zip(found, counts, strict=True)
        ]
        held = Counter(
            sequence.pages[i]
            for sequence, entries in zip(found, written, strict=True)
            for i in entries
        )
        self._check_free(sum(min(n, self._holders[page] - 1) for page, n in held.items()))
        copies = []
        for sequence, entries in zip(found, written, strict=True):
            for entry in entries:
                copies += self._unshare(sequence, entry)
        batch = replace(self.batch(sequences), copies=tuple(copies))
        for sequence, count in zip(found, counts, strict=True):
            sequence.dropped += sequence.length - count
            self._shorten(sequence, count)
        return batch

    def grow(self, pages: int) -> None:
        """Count ``pages`` more free pages, which the cache must have by the next append."""
        pages = as_int("pages", pages)
        if not 0 <= pages <= MAX_PAGES - self.num_pages:
            raise ValueError(
                f"pages must be non-negative, got {pages} more than {self.num_pages}, of at most "
                f"{MAX_PAGES}"
            )
        new = range(self.num_pages, self.num_pages + pages)
        self._free[:0] = reversed(new)  # taken last
        self._holders += [0] * pages
        self.num_pages += pages

    def discard(self, sequence: int, tokens: int, begin: int = 0) -> None:
        """Forget the oldest tokens of a sequence, whole pages of them (behind a sliding window), or
        as many from token ``begin`` on (between attention sinks and a window)."""
        found, tokens = self._find(sequence), as_int("tokens", tokens)
        begin = as_int("begin", begin)
        if begin % self.page_size or not 0 <= begin <= found.length:
            raise ValueError(
                f"begin must be a multiple of the page size ({self.page_size}) in [0, "
                f"{found.length}], the tokens of sequence {sequence}, got {begin}"
            )
        if tokens % self.page_size or not 0 <= tokens <= found.length - begin:
            raise ValueError(
                f"tokens must be a multiple of the page size ({self.page_size}) in [0, "
                f"{found.length - begin}], the tokens of sequence {sequence}, got {tokens}"
            )
        first, count = begin // self.page_size, tokens // self.page_size
        for page in found.pages[first : first + count]:
            self._drop(page)
        del found.pages[first : first + count]
        found.length -= tokens

    def truncate(self, sequence: int, length: int) -> None:
        """Drop all tokens behind the first ``length`` (rejected drafts, say)."""
        found, length = self._find(sequence), as_int("length", length)
        if not 0 <= length <= found.length:
            raise ValueError(f"length must lie in [0, {found.length}], got {length}")
        self._shorten(found, length)

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other holds are free again."""
        found = self._find(sequence)
        del self._sequences[sequence]
        for page in reversed(found.pages):
            self._drop(page)

    def batch(self, sequences: Sequence[int], max_pages: int | None = None) -> PageBatch:
        """Page table and lengths of sequences as they are.

        Args:
            max_pages: width of the table, at least the most pages of one of them.
        """
        found = [self._find(name) for name in _listed("sequences", sequences)]
        most = max([1, *(len(sequence.pages) for sequence in found)])
        width = most if max_pages is None else as_int("max_pages", max_pages)
        if width < most:
            raise ValueError(f"max_pages must be at least {most}, got {max_pages}")
        if width > MAX_PAGES:
            raise ValueError(f"max_pages must be at most {MAX_PAGES}, got {max_pages}")
        rows = [sequence.pages + [0] * (width - len(sequence.pages)) for sequence in found]
        return PageBatch(
            torch.tensor(rows, dtype=torch.int32).reshape(len(found), width),
            torch.tensor([sequence.length for sequence in found], dtype=torch.int32),
            next_positions=_next_positions(found),
        )

    def _needed(self, found: list[_Sequence], counts: list[int]) -> int:
        """Free pages that an append of ``counts`` tokens takes."""
        needed = 0
        holders: dict[int, int] = {}  # of the shared pages about to be left
        for sequence, count in zip(found, counts, strict=True):
            if not count:
                continue
            needed += -(-(sequence.length + count) // self.page_size) - len(sequence.pages)
            if sequence.length % self.page_size:
                page = sequence.pages[-1]
                left = holders.setdefault(page, self._holders[page])
                if left > 1:
                    holders[page] = left - 1
                    needed += 1
        return needed

    def _find(self, name: int) -> _Sequence:
        name = as_int("sequence", name)
        if name not in self._sequences:
            raise ValueError(f"sequence must be one of those allocated and not freed, got {name}")
        return self._sequences[name]

    def _counted(
        self, sequences: Sequence[int], tokens: int | Sequence[int], name: str = "tokens"
    ) -> tuple[list[_Sequence], list[int]]:
        """Distinct sequences and the number of each."""
        found = self._distinct(sequences)
        if hasattr(tokens, "__len__") and not isinstance(tokens, (str, bytes, Tensor)):
            counts = _listed(name, tokens)
        else:
            counts = [as_int(name, tokens)] * len(found)
        if len(counts) != len(found) or min(counts, default=0) < 0:
            raise ValueError(
                f"{name} must be non-negative, one number per sequence ({len(found)}), "
                f"got {shown(tokens)}"
            )
        return found, counts

    def _distinct(self, names: Sequence[int]) -> list[_Sequence]:
        names = _listed("sequences", names)
        if len(set(names)) != len(names):
            raise ValueError(f"sequences must be distinct, got {shown(names)}")
        return [self._find(name) for name in names]

    def _add(self, sequence: _Sequence) -> int:
        name, self._next_name = self._next_name, self._next_name + 1
        self._sequences[name] = sequence
        return name

    def _check_free(self, needed: int) -> None:
        if needed > len(self._free):
            raise OutOfPages(f"{needed} pages are needed, {len(self._free)} are free")

    def _unshare(self, sequence: _Sequence, entry: int) -> list[tuple[int, int]]:
        """Give a sequence a page of its own instead of one that others hold too; the copy to
        make, if any."""
        shared = sequence.pages[entry]
        if self._holders[shared] == 1:
            return []
        self._holders[shared] -= 1
        sequence.pages[entry] = self._take()
        return [(shared, sequence.pages[entry])]

    def _shorten(self, sequence: _Sequence, length: int) -> None:
        sequence.length = length
        while len(sequence.pages) > -(-length // self.page_size):
            self._drop(sequence.pages.pop())

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)


def _next_positions(sequences: list[_Sequence]) -> Tensor | None:
    if not any(sequence.dropped for sequence in sequences):
        return None
    positions = [sequence.length + sequence.dropped for sequence in sequences]
    return torch.tensor(positions, dtype=torch.int32)


def _listed(name: str, values: Any) -> list[int]:
    """A sequence as a list; its length must be known, because an iterable may have no end."""
    if isinstance(values, Tensor):
        check_tensors(**{name: values})
    if (
        isinstance(values, (str, bytes))
        or not hasattr(values, "__len__")
        or (isinstance(values, Tensor) and values.dim() != 1)
    ):
        raise TypeError(f"{name} must be a sequence of integers, got {shown(values)}")
    return [as_int(name, value) for value in values]
