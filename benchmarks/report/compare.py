"""Two results files side by side: ratios of the times, regressions marked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

REGRESSION = 1.05  # times slower


@dataclass(frozen=True)
class Change:
    """One contestant on one case in both files.

    Attributes:
        before, after: seconds, or None where it was not timed; ``status`` then says why.
        clear: the quartiles of the two do not overlap, and both are of several samples.
    """

    key: str
    before: float | None
    after: float | None
    status: str
    clear: bool

    @property
    def ratio(self) -> float | None:
        """after / before: above 1 is slower."""
        return self.after / self.before if self.before and self.after else None

    @property
    def mark(self) -> str:
        if self.before and not self.after:
            return f"LOST: {self.status}"
        if self.ratio and self.ratio > REGRESSION:
            return "REGRESSION" if self.clear else "slower, within the spread"
        return ""

    @property
    def regressed(self) -> bool:
        return self.mark.startswith(("LOST", "REGRESSION"))


def compare(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> list[Change]:
    """Changes of the rows that both have."""
    earlier = {row["key"]: row for row in before}
    return [_change(earlier[row["key"]], row) for row in after if row["key"] in earlier]


def _change(before: dict[str, Any], after: dict[str, Any]) -> Change:
    timed = "median" in before and "median" in after
    return Change(
        key=after["key"],
        before=before.get("median"),
        after=after.get("median"),
        status=after["status"],
        clear=timed
        and min(before["samples"], after["samples"]) > 1
        and (after["low"] > before["high"] or after["high"] < before["low"]),
    )
