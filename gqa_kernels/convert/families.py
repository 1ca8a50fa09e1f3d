"""Model families as data: where a model keeps its attention layers and projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn

from ..head_map import HeadMap
from ..model_maps import layer_maps


@dataclass(frozen=True)
class Family:
    """Names inside a Hugging Face model.

    Attributes:
        model_types: values of ``config.model_type``.
        layers: path to the list of decoder layers, from the model without its head.
        attention: the attention module of a layer.
        key, value: projections of the attention module, ``nn.Linear`` with ``Hkv * D`` outputs.
    """

    model_types: tuple[str, ...]
    layers: str
    attention: str
    key: str
    value: str


FAMILIES = (
    Family(("llama", "mistral", "qwen2", "qwen3"), "layers", "self_attn", "k_proj", "v_proj"),
)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: position among the attention layers, as in the config's maps.
        module: the attention module; its first input is ``hidden_states [B, S, d]``.
        key, value: its projections.
        num_heads: ``Hq``.
        head_dim: ``D`` of K and V.
        key_map, value_map: the KV head that each query head reads.
    """

    index: int
    module: nn.Module
    key: nn.Linear
    value: nn.Linear
    num_heads: int
    head_dim: int
    key_map: HeadMap
    value_map: HeadMap


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a Hugging Face model, with the maps they have now.

    Raises:
        NotImplementedError: the model's family is not known.
    """
    return list(_attention_layers(model))


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise NotImplementedError(f"model.config.model_type must be one of {known}, got {model_type!r}")


def head_blocks(projection: nn.Linear, head_dim: int) -> Tensor:
    """The projection's rows by head, its bias (if any) as last column: ``[Hkv, D, d (+ 1)]``."""
    weight = projection.weight.detach()
    if projection.bias is not None:
        weight = _with_bias(weight, projection.bias.detach())
    return weight.unflatten(0, (-1, head_dim))


def _with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    out = weight.new_empty(weight.shape[0], weight.shape[1] + 1)
    out[:, :-1] = weight
    out[:, -1] = bias
    return out


def _attention_layers(model: nn.Module) -> Iterator[AttentionLayer]:
    family = family_of(model)
    config = model.config
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    for index, layer in enumerate(reduce(getattr, family.layers.split("."), model.base_model)):
        module = getattr(layer, family.attention)
        key, value = getattr(module, family.key), getattr(module, family.value)
        key_map, value_map = layer_maps(
            config, index, num_heads, key.out_features // head_dim, value.out_features // head_dim
        )
        yield AttentionLayer(
            index, module, key, value, num_heads, head_dim, key_map, value_map or key_map
        )
