"""convert(): a copy of a Hugging Face model with other KV heads, in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..grouping.merging import merge
from ..head_map import HeadMap
from ..model_maps import store_maps
from .families import AttentionLayer, attention_layers, head_blocks

LayerMap = HeadMap | Sequence[int] | tuple[HeadMap, HeadMap]


def convert(model: nn.Module, maps: Sequence[LayerMap], merging: str = "mean") -> nn.Module:
    """A copy of ``model`` whose query heads read the KV heads that ``maps`` say.

    Only the K and V projections change; queries and outputs stay where they are. The child runs
    with ``attn_implementation="asym_gqa"`` (:mod:`gqa_kernels.integrations.transformers`), and its
    maps are in its config: ``save_pretrained`` and ``from_pretrained`` keep them.

    Args:
        model: a causal LM of a known family (``families.py``), itself with any map.
        maps: for every layer a map of ``Hq`` entries, or a pair of them (K's, V's). All must have
            the same number of KV heads, each read by some query head.
        merging: how the old KV heads that fall into one group are merged: a name of
            ``grouping.merging.MERGING``. ``"none"`` refuses to mix heads that differ: lossless.

    Raises:
        ValueError: the maps don't fit the model.
        NotImplementedError: the family is not known, or the KV head counts differ.
    """
    layers = attention_layers(model)
    pairs = _checked(maps, layers)
    projections = [
        (
            _merged(layer.key, layer.key_map, key_map, layer.head_dim, merging),
            _merged(layer.value, layer.value_map, value_map, layer.head_dim, merging),
        )
        for layer, (key_map, value_map) in zip(layers, pairs, strict=True)
    ]
    child = copy.deepcopy(model)
    num_kv_heads = pairs[0][0].num_kv_heads
    for layer, new in zip(attention_layers(child), projections, strict=True):
        _replace(layer.key, *new[0])
        _replace(layer.value, *new[1])
        # What transformers' own attention repeats K and V by: 0 makes it fail on uneven groups,
        # which it would compute as even ones where the head counts divide.
        uniform = all(head_map.is_uniform for head_map in pairs[layer.index])
        layer.module.num_key_value_groups = layer.num_heads // num_kv_heads if uniform else 0
    child.config.num_key_value_heads = num_kv_heads
    store_maps(child.config, *zip(*pairs, strict=True))
    return child


def _checked(
    maps: Sequence[LayerMap], layers: list[AttentionLayer]
) -> list[tuple[HeadMap, HeadMap]]:
    if len(maps) != len(layers):
        raise ValueError(f"maps must have one entry per layer ({len(layers)}), got {len(maps)}")
    pairs = [_pair(entry) for entry in maps]
    for layer, pair in zip(layers, pairs, strict=True):
        for head_map in pair:
            if head_map.num_heads != layer.num_heads:
                raise ValueError(
                    f"maps[{layer.index}] must have {layer.num_heads} entries, one per query head, "
                    f"got {head_map.num_heads}"
                )
    counts = sorted({head_map.num_kv_heads for pair in pairs for head_map in pair})
    if len(counts) > 1:
        raise NotImplementedError(
            f"maps must have the same number of KV heads in every layer, for K and V, got {counts}"
        )
    return pairs


def _pair(entry: LayerMap) -> tuple[HeadMap, HeadMap]:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], HeadMap):
        return entry
    head_map = entry if isinstance(entry, HeadMap) else HeadMap(entry)
    return head_map, head_map


def _merged(
    projection: nn.Linear, old: HeadMap, new: HeadMap, head_dim: int, merging: str
) -> tuple[Tensor, Tensor | None]:
    """Weight ``[G * D, d]`` and bias ``[G * D]`` of the merged projection."""
    members = [[old[h] for h in group] for group in new.groups]
    rows = merge(head_blocks(projection, head_dim), members, merging).flatten(0, 1)
    if projection.bias is None:
        return rows, None
    return rows[:, :-1].contiguous(), rows[:, -1].contiguous()


def _replace(projection: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
        if bias is not None:
            projection.bias = nn.Parameter(bias, requires_grad=projection.bias.requires_grad)
    projection.out_features = weight.shape[0]
