"""What makes a map a refinement of another."""

from gqa_kernels import HeadMap


def is_refinement(head_map: HeadMap, parent: HeadMap) -> bool:
    """Whether no group of ``head_map`` mixes query heads of two groups of ``parent``."""
    return all(len({parent[h] for h in group}) <= 1 for group in head_map.groups)
