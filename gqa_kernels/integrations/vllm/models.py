"""vLLM model classes for checkpoints with head maps, made from vLLM's own.

A model is built in two steps. First vLLM's constructor builds it with one KV head, a number that
divides any number of query heads. Then every attention layer receives its own maps: a projection
with the rows that the checkpoint has, and an attention layer that stores as many keys and values.
Over several ranks it is the rank's part of them: see :mod:`.ranks`.
vLLM's forward functions and weight loading stay as they are.

The classes are made when vLLM asks this module for one of ``names.ARCHITECTURES``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index

from ...head_map import HeadMap
from ...models.maps import KEY_FIELD, VALUE_FIELD, stock_architecture, stored_maps
from . import backend_named
from .layer import UnevenAttention
from .names import ARCHITECTURES, BACKEND
from .ranks import (
    Heads,
    Rank,
    cut_feed_forward,
    load_heads,
    one_rank,
    set_feed_forward,
    sum_heads,
)

SHARDS = {"q": 0, "k": 1, "v": 2}


def __getattr__(name: str) -> type[nn.Module]:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(name)


@cache
def _model_class(name: str) -> type[nn.Module]:
    stock = ModelRegistry.models[stock_architecture(name)].load_model_cls()

    class Uneven(stock):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            rank = Rank.current()
            one_head = _with_one_kv_head(vllm_config, rank)
            with set_current_vllm_config(one_head), one_rank():
                super().__init__(vllm_config=one_head, prefix=prefix)
                _apply_maps(self, maps_of(vllm_config.model_config.hf_text_config), rank)
                if rank.world > 1:
                    cut_feed_forward(self, rank)

    Uneven.__name__ = Uneven.__qualname__ = name
    return Uneven


def maps_of(config: Any) -> list[tuple[HeadMap, HeadMap]]:
    """The maps of each layer, for K and for V; those of an even model if the config has none."""
    maps = stored_maps(config)
    if maps is not None:
        return maps
    heads = config.num_attention_heads
    even = HeadMap.uniform(heads, getattr(config, "num_key_value_heads", None) or heads)
    return [(even, even)] * config.num_hidden_layers


def _with_one_kv_head(vllm_config: VllmConfig, rank: Rank) -> VllmConfig:
    """The config of an ordinary model with one KV head, on our backend.

    Raises:
        NotImplementedError: a quantised model or one with experts, to be cut over ranks.
    """
    quantised, experts = vllm_config.quant_config, vllm_config.model_config.get_num_experts()
    if rank.world > 1 and (quantised is not None or experts):
        raise NotImplementedError(
            "tensor_parallel_size must be 1 for models with head maps that are quantised or have "
            f"experts, got {rank.world}"
        )
    vllm_config = copy.copy(vllm_config)
    vllm_config.model_config = model = copy.copy(vllm_config.model_config)
    vllm_config.attention_config = attention = copy.copy(vllm_config.attention_config)
    attention.backend = backend_named(BACKEND)
    text = copy.deepcopy(model.hf_text_config)
    if model.hf_config is model.hf_text_config:
        model.hf_config = text
    model.hf_text_config = text
    for field in (KEY_FIELD, VALUE_FIELD):
        setattr(text, field, None)
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = 1
    set_feed_forward(text, rank)
    return vllm_config


def _apply_maps(model: nn.Module, maps: list[tuple[HeadMap, HeadMap]], rank: Rank) -> None:
    """Give every attention layer the rank's part of its maps.

    Args:
        maps: of each layer, for K and for V.

    Raises:
        NotImplementedError: an attention layer without projections of its own.
    """
    for module, attention in _attention_layers(model):
        heads = Heads.of(*maps[extract_layer_index(attention.layer_name)], rank)
        name, stock = _projection(module, QKVParallelLinear)
        # vLLM's forward cuts the projection's output into Q, K and V: three equal parts, or K and
        # V of kv_size columns. UnevenQKV fills up what is missing.
        num_heads, *kv_heads = heads.counts
        room = max(kv_heads)
        module.num_heads = num_heads
        if hasattr(module, "kv_size"):
            module.q_size = num_heads * stock.head_size
            module.kv_size = room * stock.head_size
            module.num_kv_heads = room
        else:
            room = num_heads
        setattr(module, name, UnevenQKV(stock, heads, room))
        UnevenAttention.convert(attention, heads, room)
        if rank.world > 1:
            name, output = _projection(module, RowParallelLinear)
            setattr(module, name, _output_projection(output, heads, stock.v_head_size, rank))


def _projection(module: nn.Module, kind: type[LinearBase]) -> tuple[str, Any]:
    """The name of a module's only projection of a kind, and that projection."""
    found = [(name, x) for name, x in module.named_children() if isinstance(x, kind)]
    if len(found) != 1:
        raise NotImplementedError(
            f"an attention layer with head maps must have one {kind.__name__}, got {len(found)} "
            f"in {type(module).__name__}"
        )
    return found[0]


def _output_projection(
    stock: RowParallelLinear, heads: Heads, dim: int, rank: Rank
) -> RowParallelLinear:
    """The output projection of the rank's query heads."""
    output = RowParallelLinear(
        heads.counts[0] * dim,
        stock.output_size,
        bias=stock.has_bias,
        skip_bias_add=stock.skip_bias_add,
        params_dtype=stock.params_dtype,
        reduce_results=stock.reduce_results,
        prefix=stock.prefix,
        return_bias=stock.return_bias,
    )
    sum_heads(output, heads, dim, rank)
    return output


def _attention_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Attention]]:
    """Every module with an attention layer, and that layer."""
    for module in list(model.modules()):
        for child in module.children():
            if isinstance(child, Attention):
                yield module, child


class UnevenQKV(MergedColumnParallelLinear):
    """The projection to Q, K and V with its own number of heads for K and for V.

    Args:
        stock: what it replaces; its other properties stay.
        heads: those it has.
        room: heads of K and of V that the output has columns for; those beyond are zero.
    """

    def __init__(self, stock: QKVParallelLinear, heads: Heads, room: int):
        counts = heads.counts
        dims = (stock.head_size, stock.head_size, stock.v_head_size)
        super().__init__(
            stock.hidden_size,
            [count * dim for count, dim in zip(counts, dims, strict=True)],
            bias=stock.has_bias,
            skip_bias_add=stock.skip_bias_add,
            params_dtype=stock.params_dtype,
            quant_config=stock.quant_config,
            prefix=stock.prefix,
            return_bias=stock.return_bias,
        )
        self.missing = [(room - n) * dim for n, dim in zip(counts[1:], dims[1:], strict=True)]
        if tuple(counts) != heads.whole:
            load_heads(self, heads, dims)

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)
        if not any(self.missing):
            return result
        out, *bias = result if self.return_bias else (result,)
        q, k, v = out.split(self.output_sizes, dim=-1)
        k, v = (
            nn.functional.pad(x, (0, missing))
            for x, missing in zip((k, v), self.missing, strict=True)
        )
        out = torch.cat([q, k, v], dim=-1)
        return (out, *bias) if self.return_bias else out

    # Loaders say q, k and v.

    def validate_shard_id(self, shard_id: Any) -> Any:
        return super().validate_shard_id(SHARDS.get(shard_id, shard_id))

    def weight_loader(self, param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        shard = SHARDS.get(loaded_shard_id, loaded_shard_id)
        super().weight_loader(param, loaded_weight, shard)

    def weight_loader_v2(
        self, param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None
    ) -> None:
        shard = SHARDS.get(loaded_shard_id, loaded_shard_id)
        super().weight_loader_v2(param, loaded_weight, shard)
