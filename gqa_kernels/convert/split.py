"""Lossless splits: maps under which every query head reads the same K and V as before."""

from __future__ import annotations

import random

from ..head_map import HeadMap


def random_split(parent: HeadMap, num_kv_heads: int, seed: int | str) -> HeadMap:
    """A random refinement of ``parent`` into ``num_kv_heads`` groups, none of them empty.

    Repeatedly cuts a random group of two or more heads at a random position. The new KV heads are
    numbered at random, so groups are uneven and interleaved.

    Raises:
        ValueError: ``num_kv_heads`` is below the groups ``parent`` has or above its query heads.
    """
    generator = random.Random(seed)
    groups = [list(group) for group in parent.groups if group]
    if not len(groups) <= num_kv_heads <= parent.num_heads:
        raise ValueError(
            f"num_kv_heads must lie in [{len(groups)}, {parent.num_heads}], got {num_kv_heads}"
        )
    while len(groups) < num_kv_heads:
        group = generator.choice([group for group in groups if len(group) > 1])
        groups.remove(group)
        generator.shuffle(group)
        cut = generator.randrange(1, len(group))
        groups += [group[:cut], group[cut:]]
    generator.shuffle(groups)
    return HeadMap.from_groups(groups)
