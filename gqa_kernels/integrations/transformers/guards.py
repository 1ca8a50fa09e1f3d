"""Guards of uneven head maps: transformers' own attention would silently compute equal groups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

from torch import nn

from ...head_map import HeadMap
from ...models.maps import (
    IMPLEMENTATION_FIELD,
    KEY_FIELD,
    guard,
    guarded_architecture,
    is_uneven,
)

READS_MAPS = "reads_head_maps"  # set on attention functions that read a config's maps


def reads_maps(function: Callable) -> Callable:
    """Mark an attention function as one that reads ``config.kv_head_map``."""
    setattr(function, READS_MAPS, True)
    return function


def restore(config: object, uneven: bool) -> None:
    """Write the guard into a config again, because transformers removes it from a config it
    loads."""
    if uneven and not hasattr(config, IMPLEMENTATION_FIELD):
        guard(config)


@cache
def watch_new_models() -> None:
    """Guard every model with head maps that is built from now on.

    Its config gets its guard back, since the model may be saved before it ever runs. What saves it
    then names a class that engines refuse. Its attention layers refuse to run with an attention
    function that ignores the maps.
    """

    def look(whole: nn.Module, _: str, part: nn.Module | None) -> None:
        config = None if part is None else part.__dict__.get("config")
        if getattr(config, KEY_FIELD, None) is not None:
            with suppress(ValueError, TypeError):  # wrong maps are reported when the model runs
                restore(config, uneven=True)
            if hasattr(type(whole), "save_pretrained"):
                guard_saving(whole)
            if hasattr(part, "num_key_value_groups"):
                protect(part)

    nn.modules.module.register_module_module_registration_hook(look)


def guard_saving(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` name a class that only this package registers in engines.

    An engine that does not know the class refuses to load the model. It would ignore the maps.
    """
    model.save_pretrained = partial(_save_guarded, model)


def _save_guarded(model: nn.Module, *args: Any, **options: Any) -> Any:
    stock = type(model)
    try:
        if is_uneven(model.config):  # transformers writes the name of the model's class
            name = guarded_architecture(stock.__name__.removeprefix("FSDP"))
            model.__class__ = type(name, (stock,), {"__module__": stock.__module__})
        return stock.save_pretrained(model, *args, **options)
    finally:
        model.__class__ = stock


def guard_layer(module: nn.Module, key_map: HeadMap, value_map: HeadMap) -> None:
    """Guard an attention layer that has the heads of these maps."""
    # transformers' own attention repeats K and V by this count. 0 makes it fail on uneven groups,
    # which it would compute as even ones whenever the head counts divide.
    even = key_map == value_map and key_map.is_uniform
    module.num_key_value_groups = key_map.num_heads // key_map.num_kv_heads if even else 0
    protect(module)


def protect(module: nn.Module) -> None:
    """Make an attention layer refuse attention functions that ignore its config's maps."""
    if refuse_equal_groups not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(refuse_equal_groups)


def refuse_equal_groups(module: nn.Module, _: Any) -> None:
    """Raise NotImplementedError if an uneven layer is about to run with equal groups."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = module.config
    if getattr(config, IMPLEMENTATION_FIELD, None) is None:
        return
    name = config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)  # None: eager
    if not getattr(function, READS_MAPS, False):
        raise NotImplementedError(
            f"attn_implementation must be 'asym_gqa' for a model with uneven head maps, got "
            f"{name!r}, which would compute equal groups: call model.set_attn_implementation("
            "gqa_kernels.integrations.transformers.register())"
        )
