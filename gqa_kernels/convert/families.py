"""Model families as data: where a model keeps its attention layers, projections and rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import nn

from ..head_map import HeadMap
from ..model_maps import layer_maps
from . import projections
from .projections import Heads, Names

if TYPE_CHECKING:  # grouping reads models through this module: imported when it is used
    from ..grouping.weights import LayerWeights, Rotary


@dataclass(frozen=True)
class Stack:
    """A list of blocks, each with one attention layer of a kind.

    Attributes:
        blocks: path to the list, from the model without its head.
        attention: path to the attention module, from a block.
        output: path to the output projection, from a block.
    """

    blocks: str
    attention: str
    output: str


@dataclass(frozen=True)
class Family:
    """Names and conventions of a model family in Hugging Face transformers.

    Attributes:
        model_types: values of ``config.model_type``.
        stacks: where attention layers are, in the order in which their maps are numbered. A model
            may lack some of them (an encoder out of an encoder-decoder).
        names: of the projections inside the attention module.
        num_heads, head_dim: config fields; ``head_dim`` None or absent is hidden size / heads.
        num_kv_heads: config field of ``Hkv``, None where the family has none (plain MHA).
        rotary: layout of the rotation's planes, None without rotation.
        scale: factor of the scores, None for ``D ** -0.5``.
        adapter: name of the attention class of ``attention.py`` that a converted model needs,
            None where transformers' own handles fewer KV heads.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    names: Names = field(default_factory=Names)
    num_heads: str = "num_attention_heads"
    head_dim: str = "head_dim"
    num_kv_heads: str | None = None
    rotary: str | None = None
    scale: float | None = None
    adapter: str | None = None


FAMILIES = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3"),
        (Stack("layers", "self_attn", "self_attn.o_proj"),),
        num_kv_heads="num_key_value_heads",
        rotary="half_split",
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
            Stack("decoder.block", "layer.0.SelfAttention", "layer.0.SelfAttention.o"),
            Stack("decoder.block", "layer.1.EncDecAttention", "layer.1.EncDecAttention.o"),
        ),
        Names("q", "k", "v"),
        num_heads="num_heads",
        head_dim="d_kv",
        scale=1.0,
    ),
)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: position among the attention layers, as in the config's maps.
        module: the attention module; its first input is ``hidden_states [B, S, d]``, and K and V
            are made from ``key_value_states`` where it is given (cross-attention).
        output: the output projection.
        family: what it belongs to.
        num_heads: ``Hq``.
        head_dim: ``D`` of K and V.
        key_map, value_map: the KV head that each query head reads.
        rotary: how q and k turn with the position, None if they don't.
    """

    index: int
    module: nn.Module
    output: nn.Module
    family: Family
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
        """The projection of K: the fused one where q, k and v are one."""
        return getattr(self.module, self.family.names.fused or self.family.names.key)

    @property
    def value(self) -> nn.Module:
        """The projection of V: the fused one where q, k and v are one."""
        return getattr(self.module, self.family.names.fused or self.family.names.value)

    def weights(self) -> LayerWeights:
        """The layer by head; the tensors may be views of the model's parameters."""
        from ..grouping.weights import LayerWeights

        q, k, v = projections.read(self.module, self.family.names, self.heads)
        o = projections.read_output(self.output, self.num_heads)
        q_norm, k_norm = (getattr(self.module, name, None) for name in ("q_norm", "k_norm"))
        norms = {}
        if q_norm is not None:
            norms = {
                "q_norm": q_norm.weight.detach(),
                "k_norm": k_norm.weight.detach(),
                "norm_eps": q_norm.variance_epsilon,
            }
        return LayerWeights(
            q.weight, k.weight, v.weight, o.weight, self.key_map, self.value_map,
            q_bias=q.bias, k_bias=k.bias, v_bias=v.bias, o_bias=o.bias,
            rotary=self.rotary, scale=self.family.scale, **norms,
        )  # fmt: skip


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a Hugging Face model, with the maps they have now.

    Raises:
        NotImplementedError: the model's family is not known, or its modules are named otherwise
            (transformers before 5 names those of some families differently).
        ValueError: a projection's shape doesn't fit the config.
    """
    family = family_of(model)
    layers = list(_attention_layers(model, family))
    if not layers:
        blocks = ", ".join(stack.blocks for stack in family.stacks)
        raise NotImplementedError(
            f"a {family.model_types[0]} model must keep its attention layers in {blocks}, as "
            f"transformers 5 does, got a {type(model).__name__} without"
        )
    return layers


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        NotImplementedError: there is none in ``FAMILIES``.
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
) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """``(index, attention module, output projection)`` of each attention layer.

    T5's layers are numbered encoder first, then the decoder's, then its cross-attentions: the
    index is not the ``layer_idx`` that caches go by.
    """
    index = 0
    for stack in family.stacks:
        for block in _reach(model.base_model, stack.blocks) or ():
            module, output = (_reach(block, path) for path in (stack.attention, stack.output))
            if module is None or output is None:
                raise NotImplementedError(
                    f"blocks of a {family.model_types[0]} model must have {stack.attention} and "
                    f"{stack.output}, as in transformers 5, got a {type(block).__name__} without"
                )
            yield index, module, output
            index += 1


def _attention_layers(model: nn.Module, family: Family) -> Iterator[AttentionLayer]:
    config = model.config
    num_heads, dim = getattr(config, family.num_heads), head_dim(config, family)
    rotary = _rotary(model, family)
    for index, module, output in attention_modules(model, family):
        heads = projections.head_counts(module, family.names, num_heads, dim)
        key_map, value_map = layer_maps(config, index, num_heads, heads.key, heads.value)
        yield AttentionLayer(
            index, module, output, family, num_heads, dim, key_map, value_map or key_map, rotary
        )


def _rotary(model: nn.Module, family: Family) -> Rotary | None:
    if family.rotary is None:
        return None
    from ..grouping.weights import Rotary

    frequencies = model.base_model.rotary_emb.inv_freq.tolist()
    return Rotary(2 * len(frequencies), family.rotary, tuple(frequencies))


def _reach(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, None where there is none."""
    return reduce(lambda at, name: getattr(at, name, None), path.split("."), module)


def head_blocks(projection: nn.Linear, head_dim: int):
    import torch

    weight = projection.weight.detach()
    if projection.bias is not None:
        weight = torch.cat([weight, projection.bias.detach()[:, None]], 1)
    return weight.unflatten(0, (-1, head_dim))
