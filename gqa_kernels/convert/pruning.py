"""prune_heads(): a copy of a Hugging Face model without some of its query heads.

Kernels need no divisibility, so any heads may go, in each layer others. A KV head stays as long as
some query head reads it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from ..head_map import HeadMap
from ..models.families import (
    AttentionLayer,
    attention_layers,
    attention_modules,
    family_of,
    layer_weights,
)
from ..models.weights import LayerWeights
from .model import check_count, set_maps, write_layer


def prune_heads(model: nn.Module, dropped: Sequence[Collection[int]]) -> nn.Module:
    """A copy of a model without some query heads and without the KV heads that only they read.

    The child runs with ``attn_implementation="asym_gqa"``; its maps are in its config, one entry
    per query head left, and ``save`` and ``load`` keep it. The config still counts the parent's
    query heads.

    Args:
        model: of a known family, itself with any map.
        dropped: for every attention layer the numbers of the query heads to drop, for example
            ``lowest_heads(scores, 24)``. At least one must stay.

    Raises:
        ValueError: not one entry per layer, a head that the layer doesn't have, or all of them.
        NotImplementedError: the family is not known, or its layers have more than projections by
            head: a position bias (T5) or sinks (GPT-OSS).

    Example::

        >>> child = prune_heads(model, [[0, 3]] + [[]] * (num_layers - 1))
        >>> child.set_attn_implementation(register())
    """
    layers = attention_layers(model)
    check_count(dropped, len(layers), "dropped")
    pruned = [_pruned(layer, heads) for layer, heads in zip(layers, dropped, strict=True)]
    child, family = copy.deepcopy(model), family_of(model)
    places = attention_modules(child, family)
    for weights, (_, module, output) in zip(pruned, places, strict=True):
        write_layer(module, output, family, weights)
    set_maps(child, family, [(weights.key_map, weights.value_map) for weights in pruned])
    return child


def lowest_heads(scores: Sequence[Sequence[float]], count: int) -> list[list[int]]:
    """The ``count`` query heads of a model with the lowest scores, by layer; one stays in each.

    Args:
        scores: ``[L][Hq]``, higher for heads that matter more, as Torch-Pruning's importances.
        count: heads to drop in all layers together.

    Raises:
        ValueError: more heads than may go.

    Example::

        >>> from gqa_kernels.convert import lowest_heads
        >>> lowest_heads([[0.1, 0.2, 0.3], [0.9, 0.15, 0.8]], 2)
        [[0], [1]]
    """
    found: list[list[int]] = [[] for _ in scores]
    most = sum(len(layer) - 1 for layer in scores)
    if not 0 <= operator.index(count) <= most:
        raise ValueError(f"count must lie in [0, {most}], a head stays in each layer, got {count}")
    order = sorted(
        (float(s), layer, h) for layer, each in enumerate(scores) for h, s in enumerate(each)
    )
    for _, layer, head in order:
        if sum(map(len, found)) == count:
            break
        if len(found[layer]) < len(scores[layer]) - 1:
            found[layer].append(head)
    return [sorted(heads) for heads in found]


def _pruned(layer: AttentionLayer, dropped: Collection[int]) -> LayerWeights:
    name = f"dropped[{layer.index}]"
    wrong = [h for h in dropped if not 0 <= operator.index(h) < layer.num_heads]
    if wrong:
        raise ValueError(f"{name} must name heads from 0 to {layer.num_heads - 1}, got {wrong[0]}")
    kept = [h for h in range(layer.num_heads) if h not in dropped]
    if not kept:
        raise ValueError(f"{name} must leave at least one of {layer.num_heads} heads, got all")
    for attribute, what in (("sinks", "sinks"), ("has_relative_attention_bias", "position biases")):
        if hasattr(layer.module, attribute) and len(kept) < layer.num_heads:
            raise NotImplementedError(
                f"a {layer.family.model_types[0]} model must have no {what} by head to drop heads, "
                f"got them in layer {layer.index}"
            )
    weights = layer_weights(layer)
    weights = replace(
        weights,
        q=weights.q[kept],
        q_bias=None if weights.q_bias is None else weights.q_bias[kept],
        o=weights.o[:, kept],
        **_side(weights, "k", kept),
        **_side(weights, "v", kept),
    )
    return weights


def _side(weights: LayerWeights, side: str, kept: Sequence[int]) -> dict:
    """The fields of K or V with the heads that are still read, in their old order."""
    name = "key_map" if side == "k" else "value_map"
    old: HeadMap = getattr(weights, name)
    read = sorted({old[h] for h in kept})
    bias = getattr(weights, f"{side}_bias")
    return {
        name: HeadMap([read.index(old[h]) for h in kept]),
        side: getattr(weights, side)[read],
        f"{side}_bias": None if bias is None else bias[read],
    }
