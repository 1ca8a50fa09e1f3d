"""convert(): a copy of a Hugging Face model with other KV heads, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from ..grouping.calibration import LayerStats
from ..grouping.merging import merge_layer
from ..head_map import HeadMap
from ..integrations.transformers.guards import guard_layer, guard_saving
from ..models import projections
from ..models.families import (
    AttentionLayer,
    Family,
    attention_layers,
    attention_modules,
    family_of,
    head_dim,
    layer_weights,
)
from ..models.maps import INDEX, store_maps
from ..models.projections import Heads, Projection
from ..models.weights import LayerWeights
from .attention import install

LayerMap = HeadMap | Sequence[int] | tuple[HeadMap, HeadMap]


def convert(
    model: nn.Module,
    maps: Sequence[LayerMap],
    merging: str = "mean",
    *,
    moments: Sequence[LayerStats] | None = None,
    restore_norms: bool | Sequence[bool] = False,
    share_weights: bool = False,
) -> nn.Module:
    """A copy of ``model`` whose query heads read the KV heads that ``maps`` name.

    The order of the query heads doesn't change. The child runs with
    ``attn_implementation="asym_gqa"`` (:mod:`gqa_kernels.integrations.transformers`), and its maps
    are in its config; ``save`` and ``load`` of :mod:`gqa_kernels.convert` keep them.

    Args:
        model: of a known family (``gqa_kernels.models.families``), itself with any map.
        maps: for every attention layer a map of ``Hq`` entries, or a pair of them (K's, V's).
            Layers, and K and V, may have different numbers of KV heads. Some query head must read
            each.
        merging: how the old KV heads that fall into one group are merged: a method of
            ``grouping.merging``. ``"none"`` refuses to mix heads that differ: lossless.
        moments: what ``calibrate(model, ...)`` returned, for methods that need it.
        restore_norms: scale merged heads to the mean norm of the heads they replace; one value for
            all layers, or one for each.
        share_weights: let the child hold the parent's own tensors wherever the conversion changes
            nothing, instead of copies. It saves the memory of a second model; training one of the
            two then changes the other.

    Raises:
        ValueError: the maps don't fit the model.
        NotImplementedError: the family is not known.

    Examples:
        >>> child = convert(model, maps, merging="aligned", moments=stats)
        >>> child.set_attn_implementation(register())
    """
    layers = attention_layers(model)
    pairs = _checked(maps, layers)
    for name, given in (("moments", moments), ("restore_norms", restore_norms)):
        if isinstance(given, Sequence) and len(given) != len(layers):
            raise ValueError(
                f"{name} must have one entry per layer ({len(layers)}), got {len(given)}"
            )
    norms = restore_norms if isinstance(restore_norms, Sequence) else [restore_norms] * len(layers)
    # deepcopy takes what its memo holds instead of copying it. write_layer puts new tensors in.
    tensors = (*model.parameters(), *model.buffers()) if share_weights else ()
    child = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    family = family_of(model)
    places = list(attention_modules(child, family))
    for layer, pair, (_, module, output) in zip(layers, pairs, places, strict=True):
        stats = None if moments is None else moments[layer.index]
        merged = merge_layer(
            layer_weights(layer),
            *pair,
            method=merging,
            moments=stats,
            query_moments=None if stats is None else stats.query,
            restore_norms=norms[layer.index],
        )
        write_layer(module, output, family, merged)
    set_maps(child, family, pairs)
    return child


def set_maps(model: nn.Module, family: Family, pairs: Sequence[tuple[HeadMap, HeadMap]]) -> None:
    """Store maps in the config and the modules of a model whose projections fit them."""
    places = list(attention_modules(model, family))
    # An encoder and a decoder have configs of their own, copies of the model's.
    configs = {id(c): c for c in (model.config, *(module.config for _, module, _ in places))}
    counts = {head_map.num_kv_heads for pair in pairs for head_map in pair}
    guard_saving(model)
    for config in configs.values():
        store_maps(config, *zip(*pairs, strict=True))
        if family.num_kv_heads:
            setattr(config, family.num_kv_heads, max(counts))
    for index, (_, module, _) in enumerate(places):
        setattr(module, INDEX, index)
        install(module, family.adapter)
        guard_layer(module, *pairs[index])


def resize(model: nn.Module, family: Family, pairs: Sequence[tuple[HeadMap, HeadMap]]) -> None:
    """Change the projections of an unconverted model to the shapes of these maps. Their values are
    undefined."""
    dim = head_dim(model.config, family)
    places = list(attention_modules(model, family))
    check_count(pairs, len(places))
    for (key_map, value_map), (_, module, output) in zip(pairs, places, strict=True):
        heads = Heads(key_map.num_heads, key_map.num_kv_heads, value_map.num_kv_heads)
        projections.resize(module, output, family.names, heads, dim)


def check_count(given: Sequence[object], layers: int, name: str = "maps") -> None:
    """Raise ValueError unless there is an entry for every layer."""
    if len(given) != layers:
        raise ValueError(f"{name} must have one entry per layer ({layers}), got {len(given)}")


def _checked(
    maps: Sequence[LayerMap], layers: list[AttentionLayer]
) -> list[tuple[HeadMap, HeadMap]]:
    check_count(maps, len(layers))
    pairs = [_pair(entry) for entry in maps]
    for layer, pair in zip(layers, pairs, strict=True):
        for head_map in pair:
            if head_map.num_heads != layer.num_heads:
                raise ValueError(
                    f"maps[{layer.index}] must have {layer.num_heads} entries, one per query head, "
                    f"got {head_map.num_heads}"
                )
    return pairs


def _pair(entry: LayerMap) -> tuple[HeadMap, HeadMap]:
    if isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], HeadMap):
        return tuple(entry)
    head_map = entry if isinstance(entry, HeadMap) else HeadMap(entry)
    return head_map, head_map


def write_layer(
    module: nn.Module, output: nn.Module, family: Family, weights: LayerWeights
) -> None:
    """Copy the weights of a merged layer into an attention module and its output projection."""
    projections.write(
        module,
        family.names,
        [Projection(getattr(weights, s), getattr(weights, f"{s}_bias")) for s in "qkv"],
    )
    projections.write_output(output, weights.o, weights.o_bias)
