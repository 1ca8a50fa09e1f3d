"""Options: the numbers of a call, validated once and interned by value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch.compiler import is_compiling

from ..native.arguments import as_bool, as_float, as_int, shown

UNBOUNDED = -1  # a window side without limit
# An additive mask value below this hides its key.
LOWEST_MASK_VALUE = torch.finfo(torch.float32).min / 2
MAX_WINDOW = 1 << 30  # beyond any length, and no 32-bit position overflows by adding it


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The numbers of a call; made by :meth:`of`, the same object for the same values.

    Attributes:
        scale: factor of the scores, or None: ``D ** -0.5``.
        window_left: keys visible before the query's position, or -1 for all of them.
        window_right: keys visible after it (0 where causal), or -1 for all of them.
        softcap: cap of the scores, 0.0 for none.
        batch_invariant: whether a query's bits depend on its own keys alone.
        dropout_p: part of the probabilities that is dropped.
        used: names of those in use, as ``Capabilities.options`` has them.
        kind: which numbers are not the default, a bit for each.
    """

    scale: float | None
    window_left: int
    window_right: int
    softcap: float
    batch_invariant: bool
    dropout_p: float
    used: tuple[str, ...]
    kind: int

    @staticmethod
    def of(
        causal: bool = False,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        batch_invariant: bool = False,
    ) -> Options:
        """Check and normalise the numbers of :func:`gqa_kernels.asym_gqa_attention`. As in
        FlashAttention, a window side of -1 is unbounded and a softcap of 0.0 is none.

        Raises:
            ValueError, TypeError: the message names the option, the rule and the value.
        """
        if (
            window is None and scale is None and softcap is None and batch_invariant is False
            and (causal is False or causal is True) and type(dropout_p) is float and not dropout_p
        ):  # fmt: skip
            return _CAUSAL if causal else _DEFAULTS
        left = right = None
        if window is not None:
            if not isinstance(window, (tuple, list)) or len(window) != 2:
                kind = ValueError if isinstance(window, (tuple, list)) else TypeError
                raise kind(f"window must be a pair (left, right) or None, got {shown(window)}")
            left, right = (x if x is None or type(x) is int else as_int(f"window {side}", x)
                           for side, x in zip(_SIDES, window, strict=True))  # fmt: skip
        if type(causal) is not bool:
            causal = as_bool("causal", causal)
        if scale is not None and type(scale) is not float:
            scale = as_float("scale", scale)
        if softcap is not None and type(softcap) is not float:
            softcap = as_float("softcap", softcap)
        if type(dropout_p) is not float:
            dropout_p = as_float("dropout_p", dropout_p)
        if type(batch_invariant) is not bool:
            batch_invariant = as_bool("batch_invariant", batch_invariant)
        made_by = _checked if is_compiling() else _interned
        return made_by(causal, scale, left, right, softcap, dropout_p, batch_invariant)

    def replace(self, **changes: Any) -> Options:
        """Options with other numbers, unchecked."""
        made = ("used", "kind")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in made}
        return _of_numbers(*(given | changes).values())


_SIDES = ("left", "right")


def _checked(
    causal: bool, scale: float | None, left: int | None, right: int | None, softcap: float | None,
    dropout_p: float, batch_invariant: bool,
) -> Options:  # fmt: skip
    if not is_compiling():  # to look at a symbolic value would specialise the graph
        if scale is not None:
            as_float("scale", scale)
        if softcap is not None and as_float("softcap", softcap) < 0:
            raise ValueError(f"softcap must be positive, or None or 0.0 for none, got {softcap}")
        if not 0.0 <= as_float("dropout_p", dropout_p) < 1.0:
            raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
        if batch_invariant and dropout_p:
            raise ValueError(
                f"dropout_p must be 0.0 with batch_invariant: what is dropped depends on a "
                f"sequence's place in the batch, got {dropout_p}"
            )
    window_left, window_right = _side("left", left), _side("right", right)
    if causal:
        window_right = 0
    softcap = 0.0 if softcap is None else softcap
    made_by = _of_numbers if is_compiling() else _interned_numbers
    return made_by(scale, window_left, window_right, softcap, batch_invariant, dropout_p)


def _of_numbers(
    scale: float | None, window_left: int, window_right: int, softcap: float,
    batch_invariant: bool, dropout_p: float,
) -> Options:  # fmt: skip
    has_left, has_right = window_left != UNBOUNDED, window_right != UNBOUNDED
    has_softcap, drops = bool(softcap), bool(dropout_p)
    given = scale is not None, has_left, has_right, has_softcap, batch_invariant, drops
    names = {
        "window": has_left or has_right,
        "softcap": has_softcap,
        "dropout": drops,
        "batch_invariant": batch_invariant,
    }
    return Options(
        scale, window_left, window_right, softcap, batch_invariant, dropout_p,
        tuple(name for name, is_used in names.items() if is_used),
        sum(1 << bit for bit, is_given in enumerate(given) if is_given),
    )  # fmt: skip


_interned_numbers = lru_cache(maxsize=1024)(_of_numbers)
_interned = lru_cache(maxsize=1024)(_checked)
# What most calls have, without the time that a search in a cache takes.
_DEFAULTS = _interned_numbers(None, UNBOUNDED, UNBOUNDED, 0.0, False, 0.0)
_CAUSAL = _interned_numbers(None, UNBOUNDED, 0, 0.0, False, 0.0)


def _side(name: str, size: int | None) -> int:
    if size is None:
        return UNBOUNDED
    if size < UNBOUNDED:
        raise ValueError(
            f"window {name} must be non-negative, or None or -1 for unbounded, got {size}"
        )
    return min(size, MAX_WINDOW)
