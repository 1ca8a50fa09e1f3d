"""PagedCache: the cache of a model in ``generate``, in pages that attention reads where they lie.

A layer's ``update`` stores nothing yet: it hands the new keys and values on, and the attention
function of :mod:`.attention`, which also has the queries and the mask, gives them back to the layer
to store and to attend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...native.arguments import as_bool
from .gathered import GatheredLayer, computes_with_cached
from .headwise import Budget, BudgetedLayer, as_budgets
from .hybrid import (
    ATTENTION,
    HYBRID,
    HybridLayer,
    LinearAttentionLayer,
    layer_kinds,
    layer_without_keys,
    number_of_states,
    select_states,
    state_bytes,
)
from .paged_layer import PagedLayer
from .sequences import SequenceTable
from .states import DeferredLayer


class PagedCache(Cache):
    """Keys and values of all layers in pages, for ``generate(..., past_key_values=...)``.

    For models with ``attn_implementation="asym_gqa"``, in inference. Each KV head is stored once,
    whatever the head map; pages come as tokens come; left padding takes none; layers with a sliding
    window drop what lies behind it; beams share their common pages (copy-on-write). A prompt is
    attended as it came and then stored; everything after reads the pages in place, also where the
    numbers in them are quantised.

    Args:
        config: of the model. It gives the layers' types and their sliding windows. Layers of linear
            attention and of convolutions keep their states in transformers' own cache layers.
        page_size: tokens of a page.
        format: None stores the keys' own type; ``"int8"``, ``"fp8_e4m3"``, ``"fp8_e5m2"``,
            ``"int4"`` or ``"k8v4"`` (keys as int8, values as int4) quantises with a scale per token
            and head.
        zeros: keep a zero per token and head too (integers).
        hadamard: store keys rotated by a Hadamard matrix, as :class:`gqa_kernels.DenseKVCache` has
            it: for ``"int4"``.
        num_pages: pages of each layer's pool, allocated with the first token; None: pools grow, by
            an eighth at least.
        budgets: keys that heads keep: for each layer None, or for each KV head None (all keys) or
            ``(sinks, recent)``: attention sinks and a window (StreamingLLM, DuoAttention). Heads
            drop whole pages between both, so they keep the sinks, rounded up to pages, and the
            recent keys, up to a page more. A prompt attends to all of its keys. Layers with budgets
            keep pages of one head each, and take no padding, beams or ``crop``.

    Raises:
        NotImplementedError: a layer's type is none of those above, or a layer with budgets has
            something else than full attention.
        ValueError: budgets for another number of layers or heads, or with ``num_pages``.

    Examples:
        >>> cache = PagedCache(model.config, format="int8")
        >>> tokens = model.generate(ids, past_key_values=cache, max_new_tokens=8)
        >>> streaming = [(4, 256), None]  # KV head 0 keeps 4 sinks and 256 recent keys, head 1 all
        >>> cache = PagedCache(model.config, budgets=[streaming] * model.config.num_hidden_layers)
    """

    def __init__(
        self,
        config: Any,
        *,
        page_size: int = 64,
        format: str | None = None,
        zeros: bool = False,
        hadamard: bool = False,
        num_pages: int | None = None,
        budgets: Sequence[Sequence[Budget] | None] | None = None,
    ):
        config = config.get_text_config(decoder=True)
        kinds = layer_kinds(config)
        window = getattr(config, "sliding_window", None)
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
        with_keys = [w for w, kind in zip(windows, kinds, strict=True) if _has_keys(kind)]
        self.tables = {
            window: SequenceTable(page_size, num_pages, window)
            for window in dict.fromkeys(with_keys)
        }
        found = [[]] * len(kinds) if budgets is None else as_budgets(budgets, len(kinds))
        if any(found) and num_pages is not None:
            raise ValueError(f"num_pages must be None with budgets, got {num_pages}")
        stored = (format, zeros, as_bool("hadamard", hadamard))
        gathers = computes_with_cached(config)
        if gathers and any(found):
            raise NotImplementedError(
                "budgets must be None for a model that computes with what it has cached "
                f"({config.model_type}), got {budgets}"
            )
        layers = []
        for window, kind, layer_budgets in zip(windows, kinds, found, strict=True):
            if layer_budgets and kind not in ATTENTION:
                raise NotImplementedError(
                    f"budgets must be None in layers of {kind}, got {layer_budgets}"
                )
            if kind == HYBRID:
                layer = HybridLayer(number_of_states(config), self.tables[None], *stored)
                layers.append(layer)
            elif kind not in ATTENTION:
                layers.append(layer_without_keys(kind, config))
            elif not layer_budgets:
                layer_type = GatheredLayer if gathers else PagedLayer
                layers.append(layer_type(self.tables[window], *stored))
            elif window is not None:
                raise NotImplementedError(
                    f"budgets must be None in layers with a sliding window, got {layer_budgets}"
                )
            else:
                layers.append(BudgetedLayer(page_size, *stored, layer_budgets))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held for keys, values and scales, spare pages included, and for the
        states of other layers."""
        return sum(
            layer.nbytes if isinstance(layer, DeferredLayer) else state_bytes(layer)
            for layer in self.layers
            if isinstance(layer, (DeferredLayer, LinearAttentionLayer))
        )

    def crop(self, tokens: int) -> None:
        """Remove the last ``-tokens`` positions, or keep the first ``tokens`` if that is positive
        (transformers 4)."""
        self._refuse_budgets("crop")
        seen = self.get_seq_length()
        kept = max(seen + tokens, 0) if tokens <= 0 else min(tokens, seen)
        for table in self.tables.values():
            table.crop(kept)
        for layer in self.layers:
            if isinstance(layer, DeferredLayer):
                layer.seen = min(layer.seen, kept)
            if isinstance(layer, LinearAttentionLayer):
                LinearAttentionLayer.crop(layer, kept - seen)

    def activate_past_recording(self) -> None:
        """Keep what falls behind a sliding window until the next ``crop``, to roll back to."""
        self._refuse_budgets("activate_past_recording")
        for table in self.tables.values():
            table.keep_past = True
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the past of another (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order, some perhaps more than once."""
        self._refuse_budgets("batch_select_indices")
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for table in self.tables.values():
            if table.batch:
                table.select(indices.tolist())
        select_states(self.layers, indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row ``repeats`` times."""
        self._refuse_budgets("batch_repeat_interleave")
        batch = max(table.batch for table in self.tables.values())
        rows = [row for row in range(batch) for _ in range(repeats)]
        for table in self.tables.values():
            table.select(rows)
        select_states(self.layers, rows)

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        for table in self.tables.values():
            table.clear()
        for layer in self.layers:
            layer.reset()

    def _refuse_budgets(self, what: str) -> None:
        if any(isinstance(layer, BudgetedLayer) for layer in self.layers):
            raise NotImplementedError(f"{what} needs every key, and heads with budgets drop some")


def _has_keys(kind: str) -> bool:
    return kind in ATTENTION or kind == HYBRID


def layer_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer of a decoder, in positions; None: all are seen.

    Raises:
        NotImplementedError: a layer is not attention.
    """
    kinds = layer_kinds(config)
    for kind in kinds:
        if kind not in ATTENTION:
            raise NotImplementedError(
                f"config.layer_types must be {' or '.join(ATTENTION)}, got {kind!r}"
            )
    window = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in kinds]
