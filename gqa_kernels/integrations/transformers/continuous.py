"""Continuous batching: transformers' scheduler and pages with our attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...models.maps import stored_maps
from .attention import register
from .versions import BATCHING, require_transformers


@contextmanager
def continuous_batching(model: nn.Module, backend: str = "auto") -> Iterator[nn.Module]:
    """Run the model's continuous batching on this package, with its maps::

        with continuous_batching(model):
            outputs = model.generate_batch(prompts, ...)

    The pages are in transformers' own cache. It gathers a request's keys for every step, as it does
    for flash attention, and makes no mask.

    Args:
        model: must have the same number of KV heads in every layer, for K and V alike.
        backend: as for :func:`.register`.

    Raises:
        ImportError: transformers is missing or too old.
        NotImplementedError: the config's maps have other counts.

    Examples:
        >>> with continuous_batching(model):
        ...     outputs = model.generate_batch([[5, 9, 3], [7]], max_new_tokens=4)
    """
    require_transformers(BATCHING)
    _check_heads(model.config)
    # If an implementation's name contains "flash", transformers passes packed queries and no mask.
    # set_attn_implementation would search for a kernel of that name, so the name is set directly.
    name = register(f"asym_gqa_flash_{backend}", backend)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield model
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _check_heads(config: Any) -> None:
    heads = getattr(config, "num_key_value_heads", None)
    found = {m.num_kv_heads for pair in stored_maps(config) or () for m in pair}
    if found - {heads}:
        raise NotImplementedError(
            f"continuous batching must have config.num_key_value_heads ({heads}) key and value "
            f"heads in every layer, got {sorted(found)}: generate() holds any"
        )
