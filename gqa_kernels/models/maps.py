"""Head maps in a Hugging Face model's config: one list per layer, saved and loaded with it.

``config.kv_head_map[layer][h]`` is the KV head that query head ``h`` reads in that layer.
``config.value_head_map`` is the same for V, if K and V are grouped differently. A config without
these fields is ordinary GQA.

If ordinary GQA can't compute the maps, the config also requests the implementation ``asym_gqa``.
Then transformers refuses to load the model unless that name is registered. Without this, it would
silently run equal, contiguous groups whenever the head counts divide. Engines that choose their own
attention (vLLM, SGLang) look at the architecture's name, which :func:`guarded_architecture`
changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..head_map import HeadMap

KEY_FIELD = "kv_head_map"
VALUE_FIELD = "value_head_map"
IMPLEMENTATION_FIELD = "attn_implementation"
# The same for transformers before 5, which ignores the first field in a file. It is also stricter:
# a file with it loads with no other implementation, even if the caller names one.
STRICT_FIELD = "_attn_implementation"
ARCHITECTURE_PREFIX = "AsymGQA"
IMPLEMENTATION = "asym_gqa"
INDEX = "attention_index"  # attribute of an attention module: the index of its map


def layer_maps(
    config: Any, layer: int | None, num_heads: int, num_k_heads: int, num_v_heads: int
) -> tuple[HeadMap, HeadMap | None]:
    """The maps of a layer: K's, and V's if it has its own (else None).

    Raises:
        ValueError: the config's maps don't fit the head counts, or it has none and the counts
            don't divide.
        TypeError: the config's maps are not lists of integers.
    """
    key_map = _read(config, KEY_FIELD, layer, num_heads, num_k_heads)
    value_map = _read(config, VALUE_FIELD, layer, num_heads, num_v_heads)
    if key_map is None:
        if num_heads % num_k_heads:
            raise ValueError(
                f"config.{KEY_FIELD} must say which of {num_k_heads} KV heads each of {num_heads} "
                "query heads reads, since the counts don't divide, got none: load a converted "
                "checkpoint with gqa_kernels.convert.load, or set a list of "
                f"{num_heads} KV heads for each layer"
            )
        uniform = HeadMap.uniform if torch.compiler.is_compiling() else _uniform
        key_map = uniform(num_heads, num_k_heads)
    return key_map, value_map


def query_heads(config: Any, layer: int, default: int) -> int:
    """Query heads of a layer, some of which may have been dropped: the length of its map."""
    maps = _field(config, KEY_FIELD)
    known = maps is not None and layer < len(maps) and isinstance(maps[layer], (list, tuple))
    return len(maps[layer]) if maps is not None and known else default


def layer_index(module: Any) -> int | None:
    """The index of an attention module's map in the config.

    Converted modules store it. In a model that transformers loaded, it is the ``layer_idx``.

    Raises:
        ValueError: transformers loaded an encoder-decoder, whose ``layer_idx`` is ambiguous.
    """
    index = getattr(module, INDEX, None)
    if index is not None:
        return index
    config = getattr(module, "config", None)
    maps, layers = _field(config, KEY_FIELD), getattr(config, "num_hidden_layers", None)
    if maps is not None and layers is not None and len(maps) > layers:
        raise ValueError(
            f"a model with {len(maps)} maps for {layers} layers must be loaded by "
            "gqa_kernels.convert.load, got an attention module that transformers loaded"
        )
    return getattr(module, "layer_idx", None)


def store_maps(config: Any, key_maps: Sequence[HeadMap], value_maps: Sequence[HeadMap]) -> None:
    """Write the maps of all layers into a config. V's are written only if they differ from K's."""
    setattr(config, KEY_FIELD, [list(m.entries) for m in key_maps])
    if list(key_maps) != list(value_maps):
        setattr(config, VALUE_FIELD, [list(m.entries) for m in value_maps])
    elif getattr(config, VALUE_FIELD, None) is not None:
        setattr(config, VALUE_FIELD, None)
    guard(config)


def stored_maps(config: Any) -> list[tuple[HeadMap, HeadMap]] | None:
    """(K's map, V's map) of every layer, as ``store_maps`` wrote them; None if there are none.

    Raises:
        ValueError, TypeError: the fields hold other values.
    """
    keys, values = _field(config, KEY_FIELD), _field(config, VALUE_FIELD)
    if keys is None:
        if values is not None:
            raise ValueError(f"config.{VALUE_FIELD} must come with {KEY_FIELD}, got it alone")
        return None
    if values is not None and len(values) != len(keys):
        raise ValueError(
            f"config.{VALUE_FIELD} must have a map for each of {len(keys)} layers, got "
            f"{len(values)}"
        )
    named = ((KEY_FIELD, keys), (VALUE_FIELD, keys if values is None else values))
    sides = ([_stored(name, i, entries) for i, entries in enumerate(maps)] for name, maps in named)
    return list(zip(*sides, strict=True))


def guard(config: Any) -> None:
    """Set ``attn_implementation: asym_gqa`` in a config whose maps need it, for later loads."""
    fields = vars(config)
    if is_uneven(config):
        setattr(config, IMPLEMENTATION_FIELD, IMPLEMENTATION)
        # A transformers config has a property of this name, which hides the entry. The entry is
        # saved with the config and takes effect only when it is loaded.
        fields[STRICT_FIELD] = IMPLEMENTATION
    else:
        fields.pop(IMPLEMENTATION_FIELD, None)
        fields.pop(STRICT_FIELD, None)


def is_uneven(config: Any) -> bool:
    """Whether the config has maps that ordinary GQA can't compute."""
    return not all(k == v and k.is_uniform for k, v in stored_maps(config) or ())


def guarded_architecture(name: str) -> str:
    """The entry of ``config.architectures`` of an uneven model: a class that only we register."""
    return name if name.startswith(ARCHITECTURE_PREFIX) else ARCHITECTURE_PREFIX + name


def stock_architecture(name: str) -> str:
    """transformers' class for an entry of ``config.architectures``."""
    return name.removeprefix(ARCHITECTURE_PREFIX)


def _read(
    config: Any, field: str, layer: int | None, num_heads: int, num_kv_heads: int
) -> HeadMap | None:
    maps = _field(config, field)
    if maps is None:
        return None
    if layer is None or not 0 <= layer < len(maps):
        raise ValueError(f"config.{field} must have a map for layer {layer}, got {len(maps)} maps")
    if not isinstance(maps[layer], (list, tuple)):
        raise TypeError(_not_entries(field, layer, maps[layer]))
    if len(maps[layer]) != num_heads:
        raise ValueError(
            f"config.{field}[{layer}] must have {num_heads} entries, one per query head, got "
            f"{len(maps[layer])}"
        )
    make = HeadMap if torch.compiler.is_compiling() else _head_map
    return make(tuple(maps[layer]), num_kv_heads)


def _field(config: Any, field: str) -> Sequence[Sequence[int]] | None:
    """The maps in a field, without a check of their values."""
    maps = getattr(config, field, None)
    if maps is not None and not isinstance(maps, (list, tuple)):
        raise TypeError(f"config.{field} must be a list with a head map per layer, got {maps!r}")
    return maps


def _stored(field: str, layer: int, entries: Any) -> HeadMap:
    if not isinstance(entries, (list, tuple)):
        raise TypeError(_not_entries(field, layer, entries))
    try:
        return HeadMap(entries)
    except (TypeError, ValueError) as error:
        raise type(error)(f"config.{field}[{layer}]: {error}") from error


def _not_entries(field: str, layer: int, entries: Any) -> str:
    return (
        f"config.{field}[{layer}] must be a list with a KV head per query head, got {entries!r:.80}"
    )


@cache
def _head_map(entries: tuple[int, ...], num_kv_heads: int) -> HeadMap:
    return HeadMap(entries, num_kv_heads)


@cache
def _uniform(num_heads: int, num_kv_heads: int) -> HeadMap:
    return HeadMap.uniform(num_heads, num_kv_heads)
