"""Continuous batching: transformers' scheduler and pages with our attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from ...models.maps import stored_maps
from .attention import register
from .versions import BATCHING, require_transformers


@contextmanager
def continuous_batching(model: nn.Module, backend: str = "auto") -> Iterator[nn.Module]:
    """Run the model's continuous batching on this package, with its maps::

        with continuous_batching(model):
            outputs = model.generate_batch(prompts, ...)

    The pages are in transformers' own cache. It gathers a request's keys for every step, as it does
    for flash attention, and makes no mask. It has one number of heads for all layers. If those of
    the model differ, its pages are as wide as the most heads of a layer, K or V, and the others
    leave a part of theirs unused; :class:`.PagedCache` stores what each layer has.

    Args:
        model: with any maps.
        backend: as for :func:`.register`.

    Raises:
        ImportError: transformers is missing or too old.

    Examples:
        >>> with continuous_batching(model):
        ...     outputs = model.generate_batch([[5, 9, 3], [7]], max_new_tokens=4)
    """
    require_transformers(BATCHING)
    # If an implementation's name contains "flash", transformers passes packed queries and no mask.
    # set_attn_implementation would search for a kernel of that name, so the name is set directly.
    name = register(f"asym_gqa_flash_{backend}", backend)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation = name
    try:
        with _pages_for_most_heads(model.config):
            yield model
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def _pages_for_most_heads(config: Any) -> Iterator[None]:
    """Let transformers' cache hold layers whose numbers of KV heads differ: it is made for the most
    heads, and what a layer stores and reads is padded and cut to that number."""
    heads = getattr(config, "num_key_value_heads", None)
    found = {m.num_kv_heads for pair in stored_maps(config) or () for m in pair}
    if not found - {heads}:
        yield
        return
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    most, update = max(found), PagedAttentionCache.update

    def padded_update(
        self: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        given = (key_states, value_states)
        if self.config is not config:  # another model's
            return update(self, *given, layer_idx, kwargs)
        wide = [pad(x, (0, 0, 0, 0, 0, most - x.shape[1])) for x in given]
        stored = update(self, *wide, layer_idx, kwargs)
        keys, values = (x[:, : y.shape[1]] for x, y in zip(stored, given, strict=True))
        return keys, values

    config.num_key_value_heads = most
    PagedAttentionCache.update = padded_update
    try:
        yield
    finally:
        PagedAttentionCache.update = update
        config.num_key_value_heads = heads
