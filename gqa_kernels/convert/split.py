"""Lossless splits: maps under which every query head still reads the K and V it read before."""

from __future__ import annotations

import random

from ..head_map import HeadMap


def is_refinement(head_map: HeadMap, parent: HeadMap) -> bool:
    """True where no group of ``head_map`` mixes query heads of two groups of ``parent``."""
    return all(len({parent[h] for h in group}) <= 1 for group in head_map.groups)


def random_split(parent: HeadMap, num_kv_heads: int, seed: int | str) -> HeadMap:
    """A random refinement of ``parent`` into ``num_kv_heads`` groups, none of them empty.

    Groups are cut one at a time, a random one with more than one head at a random place, and the
    new KV heads are numbered at random: groups come out uneven and interleaved.

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
