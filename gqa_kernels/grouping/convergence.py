"""split_half(): is there enough calibration data for the maps not to depend on it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .calibration import LayerStats
from .objective import objective
from .search import search
from .similarity import similarity


@dataclass(frozen=True)
class SplitHalf:
    """What two halves of the calibration data say about one layer.

    Attributes:
        layer: its index.
        difference: ``|A - B| / |A + B|``, Frobenius, of the halves' second moments ``A`` and ``B``:
            0 is equal, 1 is nothing in common.
        labels: the groups found from each half.
        excess: how much worse each half's groups are than the other's by the other's distances,
            relative: 0 if they are the same.
    """

    layer: int
    difference: float
    labels: tuple[tuple[int, ...], tuple[int, ...]]
    excess: tuple[float, float]

    @property
    def same(self) -> bool:
        """Whether both halves lead to the same groups."""
        return self.labels[0] == self.labels[1]


def split_half(
    model: nn.Module,
    stats: Sequence[LayerStats],
    num_groups: int,
    *,
    side: str = "shared",
    kind: str = "functional",
    method: str = "exact",
    sizes: str | tuple[int, int] = "free",
) -> list[SplitHalf]:
    """Search every layer on each half of the data, and score each map by the other half.

    Args:
        model: what was calibrated.
        stats: of ``calibrate(model, batches, halves=True)``.
        num_groups, side, kind, method, sizes: as in ``similarity`` and ``search``.

    Raises:
        ValueError: the stats have no halves.
    """
    if any(each.halves is None for each in stats):
        raise ValueError("stats must come from calibrate(..., halves=True), got no halves")
    halves = [[each.halves[half] for each in stats] for half in (0, 1)]
    found = []
    for layer in range(len(stats)):
        distances = [similarity(model, half, layer, side, kind).array for half in halves]
        maps = [search(D, num_groups, method, sizes=sizes).labels for D in distances]
        excess = tuple(
            _ratio(objective(distances[1 - i], maps[i]), objective(distances[1 - i], maps[1 - i]))
            for i in (0, 1)
        )
        first, second = (half[layer].second_moment for half in halves)
        difference = float((first - second).norm() / (first + second).norm())
        found.append(SplitHalf(layer, difference, tuple(maps), excess))
    return found


def _ratio(value: float, best: float) -> float:
    """``value / best - 1``; 0 if both are 0."""
    return 0.0 if value == best else value / best - 1 if best else float("inf")
