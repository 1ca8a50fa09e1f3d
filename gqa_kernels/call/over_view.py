"""OverView: what the calls that write a view's memory have in common."""

from __future__ import annotations

import torch

from ..cache.view import KVView


class OverView:
    """A call over ``kv`` without options of attention; what dispatch asks of every call."""

    __slots__ = ()

    kv: KVView

    @property
    def device(self) -> torch.device:
        return self.kv.device

    @property
    def head_dim(self) -> int:
        return self.kv.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.kv.value_head_dim

    @property
    def used(self) -> list[str]:
        """No options of attention."""
        return []

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of memory, as ``Capabilities.caches`` has them."""
        return self.kv.kinds
