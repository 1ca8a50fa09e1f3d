"""Options: the numbers of a call, validated once and interned by value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

UNBOUNDED = -1  # a window side without limit
MAX_WINDOW = 1 << 30  # beyond any length, and no 32-bit position overflows by adding it


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The numbers of a call; made by :meth:`of`, the same object for the same values.

    Attributes:
        scale: factor of the scores, or None: ``D ** -0.5``.
        window_left: keys visible before the query's position, or -1 for all of them.
        window_right: keys visible after it (0 where causal), or -1 for all of them.
        softcap: cap of the scores, 0.0 for none.
        dropout_p: part of the probabilities that is dropped.
        used: names of those in use, as ``Capabilities.options`` has them.
    """

    scale: float | None
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    used: tuple[str, ...]

    @staticmethod
    def of(
        causal: bool = False,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
    ) -> Options:
        """Check and normalise the numbers of :func:`gqa_kernels.asym_gqa_attention`.

        Raises:
            ValueError, TypeError: the message names the option, the rule and the value.
        """
        left = right = None
        if window is not None:
            if not isinstance(window, (tuple, list)) or len(window) != 2:
                raise ValueError(f"window must be a pair (left, right) or None, got {window!r}")
            left, right = window
        if scale is not None and type(scale) is not float:
            scale = float(scale)
        if softcap is not None and type(softcap) is not float:
            softcap = float(softcap)
        if type(dropout_p) is not float:
            dropout_p = float(dropout_p)
        if torch.compiler.is_compiling():
            return _checked(bool(causal), scale, left, right, softcap, dropout_p)
        try:
            return _interned(bool(causal), scale, left, right, softcap, dropout_p)
        except TypeError:  # a side that has no hash, or no integer
            return _checked(bool(causal), scale, left, right, softcap, dropout_p)


def _checked(
    causal: bool, scale: float | None, left: object, right: object, softcap: float | None,
    dropout_p: float,
) -> Options:  # fmt: skip
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    window_left, window_right = _side("left", left), _side("right", right)
    if causal:
        window_right = 0
    names = {
        "window": window_left != UNBOUNDED or window_right != UNBOUNDED,
        "softcap": softcap is not None,
        "dropout": dropout_p > 0,
    }
    return Options(
        scale, window_left, window_right, softcap or 0.0, dropout_p,
        tuple(name for name, is_used in names.items() if is_used),
    )  # fmt: skip


# By type too: True is no number of tokens, though it equals 1.
_interned = lru_cache(maxsize=1024, typed=True)(_checked)


def _side(name: str, size: object) -> int:
    if size is None:
        return UNBOUNDED
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"window {name} must be an integer or None, got {size!r}")
    if size < 0:
        raise ValueError(f"window {name} must be non-negative, or None for unbounded, got {size}")
    return min(size, MAX_WINDOW)
