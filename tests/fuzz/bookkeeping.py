"""HeadMap and PageAllocator against models of them in lists and dictionaries."""

from __future__ import annotations

import pickle

import torch

from gqa_kernels import HeadMap, OutOfPages, PageAllocator, PagedKVCache

from .draw import Call, Draw


def draw_head_map(draw: Draw) -> Call:
    """Every constructor, property and way out of a map, and its shards."""
    heads, kv_heads = draw.head_count(), draw.integer(1, 6)
    entries = draw.entries(heads, kv_heads)

    def check(head_map: HeadMap) -> None:
        groups = [[h for h in range(heads) if entries[h] == g] for g in range(kv_heads)]
        assert list(map(list, head_map.groups)) == groups
        assert head_map.group_sizes == tuple(map(len, groups))
        even = heads % kv_heads == 0
        uniform = even and entries == [h // (heads // kv_heads) for h in range(heads)]
        assert head_map.is_uniform == uniform
        same = [HeadMap.from_groups(groups), HeadMap.from_json(head_map.to_json()),
                pickle.loads(pickle.dumps(head_map))]  # fmt: skip
        if entries == sorted(entries):
            same.append(HeadMap.from_group_sizes([len(group) for group in groups]))
        if uniform:
            same.append(HeadMap.uniform(heads, kv_heads))
        for other in same:
            assert other == head_map and hash(other) == hash(head_map)
        assert head_map.tensor().tolist() == entries == list(head_map)
        assert (head_map.num_heads, head_map.num_kv_heads) == (heads, kv_heads)
        world = draw.integer(1, min(heads, 4))
        shards = [head_map.shard(rank, world) for rank in range(world)]
        assert sorted(h for shard in shards for h in shard.query_heads) == list(range(heads))
        for shard in shards:
            read = [shard.kv_heads[e] for e in shard.head_map]
            assert read == [entries[h] for h in shard.query_heads]
            assert set(shard.kv_heads) == set(read)

    return Call(HeadMap, {"entries": entries, "num_kv_heads": kv_heads}, check, ("HeadMap",))


def draw_allocator(draw: Draw) -> Call:
    """Random allocations, forks, appends, cuts and frees; tokens of a pool are their numbers."""
    pages, size = draw.integer(0, 12), draw.pick(1, 2, 3, 16)

    def check(allocator: PageAllocator) -> None:
        pool = PagedKVCache.empty(max(pages, 1), size, 1, 1, dtype=torch.float32)
        tokens: dict[int, list[int]] = {}
        written = 0
        for _ in range(draw.integer(1, 25)):
            action, names = (
                draw.pick("new", "fork", "free", "cut", "drop", *["append"] * 4),
                list(tokens),
            )
            if action == "new" or not names:
                tokens[allocator.allocate()] = []
                continue
            name = draw.pick(*names)
            if action == "fork":
                length = draw.integer(0, len(tokens[name]))
                tokens[allocator.fork(name, length)] = tokens[name][:length]
            elif action == "free":
                allocator.free(name)
                del tokens[name]
            elif action == "cut":
                length = draw.integer(0, len(tokens[name]))
                allocator.truncate(name, length)
                tokens[name] = tokens[name][:length]
            elif action == "drop":
                count = draw.integer(0, len(tokens[name]) // size) * size
                allocator.discard(name, count)
                tokens[name] = tokens[name][count:]
            else:
                chosen = draw.source.sample(names, draw.integer(1, len(names)))
                count = draw.integer(0, 2 * size)
                needed, free = allocator.pages_needed(chosen, count), allocator.num_free_pages
                try:
                    batch = allocator.append(chosen, count)
                except OutOfPages:
                    assert needed > free == allocator.num_free_pages
                    continue
                assert needed == free - allocator.num_free_pages
                new = torch.arange(written, written + len(chosen) * count).float()
                written += len(chosen) * count
                rows = new.view(len(chosen), 1, count, 1)
                pool.at(batch).append(rows, rows, backend=draw.pick("auto", "reference"))
                for name, row in zip(chosen, rows, strict=True):
                    tokens[name] = tokens[name] + row.flatten().int().tolist()
        _holds(allocator, pool, tokens, pages, size)

    arguments = {"num_pages": pages, "page_size": size}
    return Call(PageAllocator, arguments, check, ("OutOfPages", "PagedKVCache", "PageAllocator"))


def _holds(allocator, pool, tokens: dict[int, list[int]], pages: int, size: int) -> None:
    """Each sequence's tokens are in its pages, and every other page is free."""
    assert set(allocator.sequences) == set(tokens)
    used = set()
    for name, expected in tokens.items():
        held = allocator.pages(name)
        assert allocator.length(name) == len(expected) and len(held) == -(-len(expected) // size)
        found = [int(pool.k[held[t // size], 0, t % size, 0]) for t in range(len(expected))]
        assert found == expected, f"sequence {name} holds {found}, expected {expected}"
        used |= set(held)
    assert allocator.num_free_pages == pages - len(used)
