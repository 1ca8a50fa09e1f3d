"""The page allocator against a model of it, under any sequence of calls."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gqa_kernels import OutOfPages, PageAllocator, PagedKVCache

NUM_PAGES = 9


class AllocatorMachine(RuleBasedStateMachine):
    """Each sequence's tokens are written to its pages as unique numbers; every sequence must read
    its own numbers back, whatever others did, and no page may be lost or held twice."""

    names = Bundle("names")
    page_size = 3

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES, self.page_size)
        self.memory = [[None] * self.page_size for _ in range(NUM_PAGES)]
        self.tokens = {}
        self.next_token = 0

    @rule(target=names)
    def allocate(self):
        name = self.allocator.allocate()
        assert name not in self.tokens
        self.tokens[name] = []
        return name

    @rule(target=names, parent=names, share=st.floats(0, 1))
    def fork(self, parent, share):
        length = round(share * len(self.tokens[parent]))
        name = self.allocator.fork(parent, length)
        self.tokens[name] = self.tokens[parent][:length]
        return name

    @rule(name=names, share=st.floats(0, 1), behind=st.floats(0, 1))
    def discard(self, name, share, behind):
        pages = len(self.tokens[name]) // self.page_size
        begin = round(behind * pages)
        count = round(share * (pages - begin)) * self.page_size
        begin *= self.page_size
        if begin:
            self.allocator.discard(name, count, begin)
        else:
            self.allocator.discard(name, count)
        del self.tokens[name][begin : begin + count]

    @rule(pages=st.integers(0, 2))
    def grow(self, pages):
        self.allocator.grow(pages)
        self.memory += [[None] * self.page_size for _ in range(pages)]

    @rule(chosen=st.lists(names, max_size=3, unique=True), count=st.integers(0, 7))
    def append(self, chosen, count):
        before = (self.allocator.num_free_pages, [self.allocator.pages(n) for n in self.tokens])
        needed = self.allocator.pages_needed(chosen, count)
        try:
            batch = self.allocator.append(chosen, count)
        except OutOfPages:
            after = (self.allocator.num_free_pages, [self.allocator.pages(n) for n in self.tokens])
            assert before == after
            assert needed > before[0]
            return
        assert before[0] - self.allocator.num_free_pages == needed
        assert batch.lengths.tolist() == [len(self.tokens[name]) for name in chosen]
        for source, target in batch.copies:
            self.memory[target] = list(self.memory[source])
        for row, name in zip(batch.page_table.tolist(), chosen, strict=True):
            for _ in range(count):
                slot = len(self.tokens[name])
                self.memory[row[slot // self.page_size]][slot % self.page_size] = self.next_token
                self.tokens[name].append(self.next_token)
                self.next_token += 1

    @rule(name=names, share=st.floats(0, 1))
    def truncate(self, name, share):
        length = round(share * len(self.tokens[name]))
        self.allocator.truncate(name, length)
        del self.tokens[name][length:]

    @rule(chosen=st.lists(names, max_size=3, unique=True), data=st.data())
    def keep(self, chosen, data):
        before = (self.allocator.num_free_pages, [self.allocator.pages(n) for n in self.tokens])
        kept = [
            sorted(data.draw(st.sets(st.sampled_from(range(len(self.tokens[name]))))))
            if self.tokens[name]
            else []
            for name in chosen
        ]
        try:
            batch = self.allocator.keep(chosen, [len(positions) for positions in kept])
        except OutOfPages:
            after = (self.allocator.num_free_pages, [self.allocator.pages(n) for n in self.tokens])
            assert before == after
            return
        assert batch.lengths.tolist() == [len(self.tokens[name]) for name in chosen]
        for source, target in batch.copies:
            self.memory[target] = list(self.memory[source])
        for row, name, positions in zip(batch.page_table.tolist(), chosen, kept, strict=True):
            for i, j in enumerate(positions):
                slot = self.memory[row[j // self.page_size]][j % self.page_size]
                assert slot == self.tokens[name][j]
                self.memory[row[i // self.page_size]][i % self.page_size] = slot
            self.tokens[name] = [self.tokens[name][j] for j in positions]

    @rule(name=consumes(names))
    def free(self, name):
        self.allocator.free(name)
        del self.tokens[name]
        with pytest.raises(ValueError, match="allocated and not freed"):
            self.allocator.free(name)

    def teardown(self):
        for name in list(self.tokens):
            self.allocator.free(name)
        assert self.allocator.num_free_pages == len(self.memory)

    @invariant()
    def every_sequence_has_its_tokens(self):
        assert set(self.allocator.sequences) == set(self.tokens)
        for name, tokens in self.tokens.items():
            pages = self.allocator.pages(name)
            assert self.allocator.length(name) == len(tokens)
            assert len(pages) == -(-len(tokens) // self.page_size)
            held = [self.memory[page][slot] for page in pages for slot in range(self.page_size)]
            assert held[: len(tokens)] == tokens

    @invariant()
    def no_page_is_lost(self):
        held = {page for name in self.tokens for page in self.allocator.pages(name)}
        assert len(held) + self.allocator.num_free_pages == len(self.memory)


class OneTokenPages(AllocatorMachine):
    page_size = 1


TestAllocator = AllocatorMachine.TestCase
TestOneTokenPages = OneTokenPages.TestCase
for case in (TestAllocator, TestOneTokenPages):
    case.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_shared_pages_are_kept_once_and_copied_when_written():
    allocator = PageAllocator(5, 4)
    pool = PagedKVCache.empty(5, 4, 1, 2, dtype=torch.float32)
    first = allocator.allocate()
    pool.at(allocator.append([first], 6)).append(*torch.ones(2, 1, 1, 6, 2))
    second = allocator.fork(first)
    assert allocator.num_free_pages == 3 and allocator.pages(first) == allocator.pages(second)
    step = allocator.append([second, first], 1)
    assert len(step.copies) == 1  # the second one to leave is alone on the page
    assert allocator.pages(first)[0] == allocator.pages(second)[0]
    assert allocator.pages(first)[1] != allocator.pages(second)[1]
    pool.at(step).append(
        *torch.tensor([2.0, 3.0]).view(1, 2, 1, 1, 1).repeat(2, 1, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    )
    for name, last in ((first, 3.0), (second, 2.0)):
        kept = pool.k[list(allocator.pages(name)), 0].flatten(0, 1)[:7, 0]
        assert kept.tolist() == [1.0] * 6 + [last]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: PageAllocator(3, 0), "page_size be at least 1, got 3 and 0"),
        (lambda a: PageAllocator(2**63, 4), r"num_pages must lie in \[0, 2\*\*31\)"),
        (lambda a: a.append([7], 1), "allocated and not freed, got 7"),
        (lambda a: a.append([0, 0], 1), r"sequences must be distinct, got \[0, 0\]"),
        (lambda a: a.append([0], -1), "tokens must be non-negative"),
        (lambda a: a.append([0], [1, 2]), r"one number per sequence \(1\)"),
        (lambda a: a.fork(0, 3), r"length must lie in \[0, 2\]"),
        (lambda a: a.truncate(0, 3), r"length must lie in \[0, 2\], got 3"),
        (lambda a: a.discard(0, 2), r"multiple of the page size \(4\) in \[0, 2\].*got 2"),
        (lambda a: a.discard(0, 4), r"multiple of the page size \(4\) in \[0, 2\].*got 4"),
        (lambda a: a.discard(0, 0, 4), r"begin must be a multiple of.*\[0, 2\].*got 4"),
        (lambda a: a.discard(0, 0, 1), "begin must be a multiple of the page size.*got 1"),
        (lambda a: a.keep([0], -1), "lengths must be non-negative, one number per sequence"),
        (lambda a: a.keep([0], 3), "at most that of each sequence, got 3 for sequence 0 of 2"),
        (lambda a: a.grow(-1), "pages must be non-negative, got -1"),
        (lambda a: a.batch([0], max_pages=0), "max_pages must be at least 1, got 0"),
    ],
)
def test_errors(call, message):
    allocator = PageAllocator(2, 4)
    allocator.allocate()
    allocator.append([0], 2)
    with pytest.raises(ValueError, match=message):
        call(allocator)
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 are free"):
        allocator.append([0], 7)


@pytest.mark.parametrize("wrong", [1.0, "3", None, True])
def test_sizes_are_integers(wrong):
    with pytest.raises(TypeError, match="num_pages must be an integer"):
        PageAllocator(wrong, 4)
