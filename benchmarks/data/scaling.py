"""How the cost of our backends grows along one axis at a time: cases, contestants, fits.

Each axis changes one number of a decode (cores: of a prefill too) and keeps the rest. Two lines are
fitted to the medians by least squares: ``seconds = factor * x ** exponent``, on logarithms, and
``seconds = fixed + slope * x``, each point weighted by 1 / seconds so that short calls count as
much as long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cases import Case, decode, over_caches, prefill
from .models import HEAVY, MILD, SKEWED

SKEWS = ("even", MILD, SKEWED, HEAVY, "giant")  # the same 32 query heads over 8 KV heads


@dataclass(frozen=True)
class Axis:
    """What changes, and where to read it off a case as rows describe it.

    Attributes:
        label: with its unit.
        value: from a case's facts, the number along the axis.
        cases: by device type.
    """

    label: str
    value: Callable[[dict], float]
    cases: Callable[[str], Iterable[Case]]


def _keys(device: str) -> Iterable[Case]:
    lengths = [2**i for i in (range(8, 16) if device == "cpu" else range(10, 18))]
    return [c for n in lengths for c in decode("llama-3-8b", (SKEWED,), 1, n)]


def _batch(device: str) -> Iterable[Case]:
    batches = (1, 2, 4, 8, 16, 32) if device == "cpu" else (1, 4, 16, 64, 256)
    return [c for b in batches for c in decode("llama-3-8b", (SKEWED,), b, 1024)]


def _kv_heads(device: str) -> Iterable[Case]:
    maps = [f"groups-{n}" for n in (1, 2, 4, 8, 16)] + ["even"]
    return decode("llama-2-7b", maps, *((1, 4096) if device == "cpu" else (16, 4096)))


def _skew(device: str) -> Iterable[Case]:
    return decode("llama-3-8b", SKEWS, *((1, 4096) if device == "cpu" else (16, 8192)))


def _splits(device: str) -> Iterable[Case]:
    (case,) = decode("llama-2-7b", ("groups-1",), 1, 16384)
    return [replace(case, splits=n) for n in (1, 2, 4, 8, 16, 32)]


def _pages(device: str) -> Iterable[Case]:
    kinds = [f"pages{n}" for n in (1, 4, 16, 64, 256)]
    shape = (1, 4096) if device == "cpu" else (16, 8192)
    return [c for c in over_caches("llama-3-8b", (SKEWED,), *shape, *kinds) if c.op != "append"]


def _cores(device: str, cases: Sequence[Case]) -> Iterable[Case]:
    threads = (1, 2, 4, 8, 16, 32) if device == "cpu" else ()
    return [replace(case, threads=n) for case in cases for n in threads]


AXES: dict[str, Axis] = {
    "keys": Axis("keys", lambda case: case["kv_len"], _keys),
    "batch": Axis("sequences", lambda case: case["batch"], _batch),
    "KV heads": Axis("KV heads (Hq = 32)", lambda case: case["num_kv_heads"], _kv_heads),
    "skew": Axis("query heads in the largest group", lambda c: max(c["group_sizes"]), _skew),
    "splits": Axis("parts of the keys", lambda case: case["splits"], _splits),
    "page size": Axis("tokens in a page", lambda c: int(c["cache"].removeprefix("pages")), _pages),
    "cores, decode": Axis(
        "cores",
        lambda case: case["threads"],
        lambda device: _cores(device, decode("llama-3-8b", (SKEWED,), 1, 8192)),
    ),
    "cores, prefill": Axis(
        "cores",
        lambda case: case["threads"],
        lambda device: _cores(device, prefill("llama-3-8b", (SKEWED,), 1, 512)),
    ),
}


def scaling_cases(device: str) -> list[Case]:
    """The cases of all axes, each once."""
    return list(dict.fromkeys(case for axis in AXES.values() for case in axis.cases(device)))


@dataclass(frozen=True)
class Fit:
    """Two lines through the medians of one axis, and how much of the spread each explains.

    Attributes:
        points: (x, seconds), ascending.
        exponent, power_r2: of the power law.
        fixed, slope, line_r2: of the straight line.
    """

    points: tuple[tuple[float, float], ...]
    exponent: float
    power_r2: float
    fixed: float
    slope: float
    line_r2: float


def fit(points: Iterable[tuple[float, float]]) -> Fit:
    """Fits to at least two points of different x.

    Raises:
        ValueError: fewer.
    """
    points = tuple(sorted(points))
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(set(x)) < 2:
        raise ValueError(f"points must have at least two different x, got {sorted(set(x))}")
    _, exponent, power_r2 = _line(np.log(x), np.log(y), np.ones_like(y))
    fixed, slope, line_r2 = _line(x, y, 1 / y)
    return Fit(points, exponent, power_r2, fixed, slope, line_r2)


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Intercept, slope and R^2 of the least-squares line with weighted residuals."""
    design = np.stack([np.ones_like(x), x], 1) * weights[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(design, y * weights, rcond=None)
    mean = np.average(y, weights=weights**2)
    residual = (((y - intercept - slope * x) * weights) ** 2).sum()
    spread = (((y - mean) * weights) ** 2).sum()
    return float(intercept), float(slope), float(1 - residual / spread) if spread else 1.0


def axis_points(rows: Iterable[dict[str, Any]], device: str) -> dict[str, list[tuple]]:
    """By axis the (x, seconds) of a results file's rows, of whichever contestant given."""
    rows = [row for row in rows if row["status"] == "ok"]
    found = {}
    for name, axis in AXES.items():
        keys = {case.key for case in axis.cases(device)}
        points = [(axis.value(r["case"]), r["median"]) for r in rows if r["case_key"] in keys]
        if len({x for x, _ in points}) > 1:
            found[name] = points
    return found
