"""Head maps in a Hugging Face model's config: one list per layer, so that they save and load.

``config.kv_head_map[layer][h]`` is the KV head that query head ``h`` reads in that layer;
``config.value_head_map`` is the same for V where K and V are grouped apart. A config without them
is ordinary GQA.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .head_map import HeadMap

KEY_FIELD = "kv_head_map"
VALUE_FIELD = "value_head_map"


def layer_maps(
    config: Any, layer: int | None, num_heads: int, num_k_heads: int, num_v_heads: int
) -> tuple[HeadMap, HeadMap | None]:
    """The maps of a layer: for K, and for V where it has its own (else None).

    Raises:
        ValueError: the config's maps don't fit the head counts, or it has none and the counts
            don't divide.
    """
    key_map = _read(config, KEY_FIELD, layer, num_heads, num_k_heads)
    value_map = _read(config, VALUE_FIELD, layer, num_heads, num_v_heads)
    return key_map or HeadMap.uniform(num_heads, num_k_heads), value_map


def store_maps(config: Any, key_maps: Sequence[HeadMap], value_maps: Sequence[HeadMap]) -> None:
    """Write the maps of all layers into a config, V's only where they differ from K's."""
    setattr(config, KEY_FIELD, [list(m.entries) for m in key_maps])
    if list(key_maps) != list(value_maps):
        setattr(config, VALUE_FIELD, [list(m.entries) for m in value_maps])
    elif getattr(config, VALUE_FIELD, None) is not None:
        setattr(config, VALUE_FIELD, None)


def _read(
    config: Any, field: str, layer: int | None, num_heads: int, num_kv_heads: int
) -> HeadMap | None:
    maps = getattr(config, field, None)
    if maps is None:
        return None
    if layer is None or not 0 <= layer < len(maps):
        raise ValueError(f"config.{field} must have a map for layer {layer}, got {len(maps)} maps")
    if len(maps[layer]) != num_heads:
        raise ValueError(
            f"config.{field}[{layer}] must have {num_heads} entries, one per query head, got "
            f"{len(maps[layer])}"
        )
    make = HeadMap if torch.compiler.is_compiling() else _head_map
    return make(tuple(maps[layer]), num_kv_heads)


@cache
def _head_map(entries: tuple[int, ...], num_kv_heads: int) -> HeadMap:
    return HeadMap(entries, num_kv_heads)
