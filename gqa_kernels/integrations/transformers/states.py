"""NewStates: new keys or values of a cache layer on their way to the attention function, and the
layers that hand them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

ONLY_OURS = (
    "keys and values of a PagedCache can only be read by attn_implementation='asym_gqa' (or "
    "another name given to gqa_kernels.integrations.transformers.register)"
)


class NewStates:
    """New keys or values of a layer on their way to its attention; not a tensor.

    Attributes:
        layer: the cache layer that stores them.
        states: ``[B, H, S, D]``, the new tokens.
        step: the step in which they were stored; None until then.
        shape: ``[B, H, positions, D]``, with the tokens before them.
    """

    def __init__(self, layer: DeferredLayer, states: Tensor):
        self.layer, self.states = layer, states
        self.step: Any = None

    @property
    def shape(self) -> torch.Size:
        batch, heads, new, dim = self.states.shape
        before = self.layer.seen if self.step is None else self.step.before
        return torch.Size((batch, heads, before + new, dim))

    def to(self, device: torch.device | str, **_: object) -> NewStates:
        """Itself: layers that share keys and values call this to have them on their device.

        Raises:
            NotImplementedError: the device is another one.
        """
        here = self.states.device
        if self.states.new_empty(0).to(device).device != here:
            raise NotImplementedError(
                f"layers that share the keys of a PagedCache must be on one device, got {here} "
                f"and {device}"
            )
        return self

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"{ONLY_OURS}, asked for .{name}")

    def __getitem__(self, index: object) -> object:
        raise TypeError(f"{ONLY_OURS}, asked for a part of them")

    @classmethod
    def __torch_function__(cls, function: object, *_: object) -> object:
        raise TypeError(f"{ONLY_OURS}, got {getattr(function, '__name__', function)}")


class DeferredLayer(CacheLayerMixin):
    """A cache layer that stores new keys when the attention function gives them back.

    Attributes:
        seen: positions of the layer.
    """

    supports_early_init = False  # the memory comes with the first keys
    seen: int

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Any, Any]:
        """New keys ``[B, Hk, S, D]`` and values, for the attention function to give back."""
        return NewStates(self, key_states), NewStates(self, value_states)

    def get_seq_length(self) -> int:
        """Positions seen, those of padding and of dropped keys included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    get_max_cache_shape = get_max_length  # transformers 4

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns that a mask needs, and the position of the first.

        Args:
            query_length: number of new tokens, or (transformers 4) their positions.
        """
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + new, 0
