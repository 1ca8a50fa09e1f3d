"""Model families as data: where a model keeps its attention layers, projections and rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from torch import nn

from ..head_map import HeadMap
from . import projections
from .maps import layer_maps, query_heads
from .projections import Heads, Names
from .weights import LayerWeights, Rotary


@dataclass(frozen=True)
class Stack:
    """A list of blocks, each with one attention layer of one kind.

    Attributes:
        blocks: path to the list, from the model without its head.
        attention: path to the attention module, from a block.
        output: path to the output projection, from a block.
        mask: the model input that is 0 on padding among the layer's own tokens.
        kv_mask: the same for K and V if they come from other tokens (cross-attention).
    """

    blocks: str
    attention: str
    output: str
    mask: str = "attention_mask"
    kv_mask: str | None = None


@dataclass(frozen=True)
class Family:
    """Names and conventions of a model family in Hugging Face transformers.

    Attributes:
        model_types: values of ``config.model_type``.
        stacks: where the attention layers are, in the order of their maps. A model may lack some of
            them (an encoder-decoder without its encoder).
        names: the projections' names inside the attention module.
        num_heads, head_dim: config fields. If ``head_dim`` is None or absent, it is hidden size /
            heads.
        num_kv_heads: config field of ``Hkv``, None if the family has none (MHA only).
        rotary: layout of the rotation's planes, None without rotation.
        adapter: name of the class in ``attention.py`` that a converted model needs, None if
            transformers' own class supports fewer KV heads.
        norm_offset: constant that is added to the weights of the norms of q and k.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    names: Names = field(default_factory=Names)
    num_heads: str = "num_attention_heads"
    head_dim: str = "head_dim"
    num_kv_heads: str | None = None
    rotary: str | None = None
    adapter: str | None = None
    norm_offset: float = 0.0


FAMILIES = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss"),
        (Stack("layers", "self_attn", "self_attn.o_proj"),),
        num_kv_heads="num_key_value_heads",
        rotary="half_split",
    ),
    Family(
        ("gemma3_text",),
        (Stack("layers", "self_attn", "self_attn.o_proj"),),
        num_kv_heads="num_key_value_heads",
        rotary="half_split",
        norm_offset=1.0,
    ),
    Family(
        ("opt",),
        (Stack("decoder.layers", "self_attn", "self_attn.out_proj"),),
        adapter="opt",
    ),
    Family(
        ("gpt2",),
        (Stack("h", "attn", "attn.c_proj"),),
        Names(fused="c_attn"),
    ),
    Family(
        ("gpt_neox",),
        (Stack("layers", "attention", "attention.dense"),),
        Names(fused="query_key_value", interleaved=True),
        rotary="half_split",
        adapter="gpt_neox",
    ),
    Family(
        ("bert",),
        (Stack("encoder.layer", "attention.self", "attention.output.dense"),),
        Names("query", "key", "value"),
    ),
    Family(("vit",), (Stack("layers", "attention", "attention.o_proj"),)),
    Family(
        ("t5",),
        (
            Stack("encoder.block", "layer.0.SelfAttention", "layer.0.SelfAttention.o"),
            Stack(
                "decoder.block", "layer.0.SelfAttention", "layer.0.SelfAttention.o",
                mask="decoder_attention_mask",
            ),
            Stack(
                "decoder.block", "layer.1.EncDecAttention", "layer.1.EncDecAttention.o",
                mask="decoder_attention_mask", kv_mask="attention_mask",
            ),
        ),
        Names("q", "k", "v"),
        num_heads="num_heads",
        head_dim="d_kv",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: position among the attention layers, as in the config's maps.
        module: the attention module. Its first input is ``hidden_states [B, S, d]``;
            cross-attention has a second one, ``key_value_states``.
        output: the output projection.
        family, stack: the family and stack of the layer.
        num_heads: ``Hq``.
        head_dim: ``D`` of K and V.
        key_map, value_map: the KV head that each query head reads.
        rotary: the rotation of q and k by position, or None.
    """

    index: int
    module: nn.Module
    output: nn.Module
    family: Family
    stack: Stack
    num_heads: int
    head_dim: int
    key_map: HeadMap
    value_map: HeadMap
    rotary: Rotary | None

    @property
    def heads(self) -> Heads:
        """Head counts of q, k and v."""
        return Heads(self.num_heads, self.key_map.num_kv_heads, self.value_map.num_kv_heads)

    @property
    def key(self) -> nn.Module:
        """The projection of K; the fused one if there is one."""
        return getattr(self.module, self.family.names.fused or self.family.names.key)

    @property
    def value(self) -> nn.Module:
        """The projection of V; the fused one if there is one."""
        return getattr(self.module, self.family.names.fused or self.family.names.value)


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a Hugging Face model, with their current maps.

    Raises:
        NotImplementedError: the model's family is unknown, or its modules have other names (as some
            families do in transformers before 5).
        ValueError: a projection's shape doesn't fit the config.
    """
    family = family_of(model)
    if getattr(model.config, "add_cross_attention", False):
        raise NotImplementedError(
            f"a {model.config.model_type} model must have no cross-attention, got "
            "config.add_cross_attention"
        )
    layers = list(_attention_layers(model, family))
    if not layers:
        blocks = ", ".join(stack.blocks for stack in family.stacks)
        raise NotImplementedError(
            f"a {family.model_types[0]} model must keep its attention layers in {blocks}, as "
            f"transformers 5 does, got a {type(model).__name__} without"
        )
    return layers


def layer_weights(layer: AttentionLayer) -> LayerWeights:
    """The weights of a layer by head. The tensors may be views of the model's parameters."""
    module = layer.module
    q, k, v = projections.read(module, layer.family.names, layer.heads)
    o = projections.read_output(layer.output, layer.num_heads)
    norms = {}
    if hasattr(module, "q_norm"):
        offset = layer.family.norm_offset
        eps = "eps" if hasattr(module.q_norm, "eps") else "variance_epsilon"
        norms = {
            "q_norm": module.q_norm.weight.detach() + offset,
            "k_norm": module.k_norm.weight.detach() + offset,
            "norm_eps": getattr(module.q_norm, eps),
        }
    return LayerWeights(
        q.weight, k.weight, v.weight, o.weight, layer.key_map, layer.value_map,
        q_bias=q.bias, k_bias=k.bias, v_bias=v.bias, o_bias=o.bias,
        rotary=layer.rotary, scale=module.scaling, **norms,
    )  # fmt: skip


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        NotImplementedError: ``FAMILIES`` has no such family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise NotImplementedError(f"model.config.model_type must be one of {known}, got {model_type!r}")


def head_dim(config: Any, family: Family) -> int:
    """``D`` of a model."""
    given = getattr(config, family.head_dim, None)
    return given or config.hidden_size // getattr(config, family.num_heads)


def attention_modules(
    model: nn.Module, family: Family
) -> Iterator[tuple[Stack, nn.Module, nn.Module]]:
    """``(stack, attention module, output projection)`` of each attention layer.

    They are in the order of the maps. For T5: first the encoder's, then the decoder's, then its
    cross-attentions. Caches number layers differently, by ``layer_idx``.
    """
    for stack in family.stacks:
        for block in _reach(model.base_model, stack.blocks) or ():
            module, output = (_reach(block, path) for path in (stack.attention, stack.output))
            if module is None or output is None:
                raise NotImplementedError(
                    f"blocks of a {family.model_types[0]} model must have {stack.attention} and "
                    f"{stack.output}, as in transformers 5, got a {type(block).__name__} without"
                )
            yield stack, module, output


def _attention_layers(model: nn.Module, family: Family) -> Iterator[AttentionLayer]:
    config = model.config
    most, dim = getattr(config, family.num_heads), head_dim(config, family)
    for index, (stack, module, output) in enumerate(attention_modules(model, family)):
        num_heads = query_heads(config, index, most)
        heads = projections.head_counts(module, family.names, num_heads, dim)
        key_map, value_map = layer_maps(config, index, num_heads, heads.key, heads.value)
        yield AttentionLayer(
            index, module, output, family, stack, num_heads, dim,
            key_map, value_map or key_map, _rotary(model, family, module),
        )  # fmt: skip


def _rotary(model: nn.Module, family: Family, module: nn.Module) -> Rotary | None:
    """The rotation in an attention module. Gemma 3 has one for each type of layer."""
    if family.rotary is None:
        return None
    rotary = model.base_model.rotary_emb
    if getattr(module, "is_sliding", False):  # transformers 4 has two modules for Gemma 3
        rotary = getattr(model.base_model, "rotary_emb_local", rotary)
    own = f"{getattr(module, 'layer_type', None)}_inv_freq"
    frequencies = getattr(rotary, own if hasattr(rotary, own) else "inv_freq").tolist()
    return Rotary(2 * len(frequencies), family.rotary, tuple(frequencies))


def _reach(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    return reduce(lambda at, name: getattr(at, name, None), path.split("."), module)
