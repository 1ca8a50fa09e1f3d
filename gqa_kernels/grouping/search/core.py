"""The compiled core, if it is worth having: ``core(num_heads)``.

Each of its functions does what the numpy code beside its call does, with sums in the same order:
the results are equal bit for bit.
"""

from __future__ import annotations

from types import ModuleType

from ...native.search_core import search_core

_FEW_HEADS = 12  # for these numpy takes less than the module would take to compile


def core(num_heads: int) -> ModuleType | None:
    """The module; None for few heads, or if there is no compiler."""
    return search_core() if num_heads > _FEW_HEADS else None
