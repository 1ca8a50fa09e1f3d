"""Layers of hybrid models in a PagedCache: attention is ours, all else is transformers' own.

Layers of linear attention (Mamba, gated delta rule) and of short convolutions keep a state of fixed
size instead of keys; layers that are experts or an MLP alone keep nothing. transformers has cache
layers for both. A layer that has attention beside linear attention (Falcon-H1) is both in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .paged_layer import PagedLayer
from .sequences import SequenceTable

try:
    from transformers.cache_utils import DummyLayer, LinearAttentionLayer
except ImportError:  # before 5.10

    class LinearAttentionLayer:  # type: ignore[no-redef]
        """In place of one that this version lacks: no layer is of it."""

    DummyLayer = LinearAttentionLayer

ATTENTION = ("full_attention", "sliding_attention")
HYBRID = "hybrid"
STATES = ("linear_attention", "conv")
NOTHING = ("moe", "mlp")


def layer_kinds(config: Any) -> list[str]:
    """What each layer of a decoder is, in the words of ``config.layer_types``.

    Raises:
        NotImplementedError: a layer is of a kind that a PagedCache can't hold.
    """
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = list(getattr(config, "layer_types", None) or [default] * config.num_hidden_layers)
    known = ATTENTION
    if hasattr(LinearAttentionLayer, "update_conv_state"):
        known += (HYBRID, *STATES, *NOTHING)
    for kind in kinds:
        if kind not in known:
            raise NotImplementedError(
                f"a PagedCache holds layers of {', '.join(known)}, got config.layer_types with "
                f"{kind!r}"
            )
    return kinds


def layer_without_keys(kind: str, config: Any) -> Any:
    """transformers' cache layer for a kind of ``STATES`` or ``NOTHING``."""
    return DummyLayer() if kind in NOTHING else LinearAttentionLayer(number_of_states(config))


def number_of_states(config: Any) -> int:
    """States of a layer with linear attention."""
    return getattr(config, "number_of_conv_states", 1)


class HybridLayer(LinearAttentionLayer, PagedLayer):
    """Pages for a layer's attention, and the state of its linear attention.

    Args:
        states: :func:`number_of_states`; the others as PagedLayer has them.
    """

    is_compileable = False

    def __init__(self, states: int, table: SequenceTable, *stored: Any):
        PagedLayer.__init__(self, table, *stored)
        LinearAttentionLayer.__init__(self, states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        """Of the pages, by position; of the states, by name: as transformers' layers call it."""
        if keys_and_values:
            PagedLayer.lazy_initialization(self, *keys_and_values)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)

    def reset(self) -> None:
        PagedLayer.reset(self)
        LinearAttentionLayer.reset(self)

    @property
    def nbytes(self) -> int:
        return PagedLayer.nbytes.__get__(self) + state_bytes(self)


def state_bytes(layer: LinearAttentionLayer) -> int:
    """Bytes of the states of linear attention."""
    found = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(x.untyped_storage().nbytes() for x in found if isinstance(x, Tensor))


def select_states(layers: list[Any], rows: list[int]) -> None:
    """Give every row of a batch the states of another."""
    index = torch.tensor(rows)
    for layer in layers:
        if isinstance(layer, LinearAttentionLayer) and layer.device is not None:
            LinearAttentionLayer.reorder_cache(layer, index)
