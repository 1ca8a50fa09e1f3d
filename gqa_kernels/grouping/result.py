"""SearchResult: a partition of the heads and what is known about it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from ..head_map import HeadMap

Sizes = str | tuple[int, int]


def canonical_labels(labels: Iterable[int]) -> tuple[int, ...]:
    """The same partition with its groups numbered by first appearance: ``2 2 0`` -> ``0 0 1``."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(int(label), len(numbers)) for label in labels)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        labels: ``H`` integers, the group of each head, groups numbered by first appearance.
        objective: sum over groups ``S`` of ``(1/|S|) * sum_{i<j in S} D_ij``.
        lower_bound: no partition within the size rule has a lower objective. 0 (always true) for
            methods that know nothing better.
        proved: True if ``lower_bound`` equals ``objective`` up to
            ``objective.TOLERANCE`` x max(objective, largest entry of D).
        seconds: wall time of the search.
        method: name of the method.
        sizes: the rule the group sizes had to obey: ``"free"``, ``"equal"`` or ``(lo, hi)``.

    Examples:
        >>> from gqa_kernels.grouping import search
        >>> search([[0, 1, 4], [1, 0, 4], [4, 4, 0]], num_groups=2).head_map
        HeadMap([0, 0, 1], num_kv_heads=2)
    """

    labels: tuple[int, ...]
    objective: float
    lower_bound: float
    proved: bool
    seconds: float
    method: str
    sizes: Sizes

    def __post_init__(self):
        if not self.labels or canonical_labels(self.labels) != tuple(self.labels):
            raise ValueError(
                "labels must number the groups by first appearance, got " + str(list(self.labels))
            )
        for name in ("objective", "lower_bound", "seconds"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.lower_bound > self.objective:
            raise ValueError(
                f"lower_bound must be at most objective ({self.objective}), got {self.lower_bound}"
            )

    @property
    def num_groups(self) -> int:
        return max(self.labels) + 1

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return self.head_map.group_sizes

    @property
    def head_map(self) -> HeadMap:
        """The labels as a map from query head to KV head."""
        return HeadMap(self.labels)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SearchResult:
        data = json.loads(text)
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise ValueError(
                f"SearchResult JSON must be an object with {', '.join(names)}, got {text[:80]}"
            )
        data["labels"] = tuple(data["labels"])
        if not isinstance(data["sizes"], str):
            data["sizes"] = tuple(data["sizes"])
        return cls(**data)
