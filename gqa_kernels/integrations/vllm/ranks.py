"""Tensor parallelism of vLLM models with head maps: the part of one rank.

vLLM's layers divide every size by the number of ranks. Here sizes need not divide: a model is built
as if there were one rank (:func:`one_rank`), with the sizes of this rank's part. Its parameters
then load that part of the checkpoint's tensors, and :class:`SummedLinear` adds up what the ranks
computed. Each rank holds the query heads that :meth:`gqa_kernels.HeadMap.shard` assigns to it and
the KV heads that these read, an equal slice of the feed-forward layers, and all of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    parallel_state,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from ...head_map import HeadMap
from .names import FEED_FORWARD_SIZES

# What a rank keeps of a tensor, of which projection (q, k or v; None: all of them in one tensor).
PartOf = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Rank:
    """One rank of tensor parallelism.

    Attributes:
        index: its number, from 0.
        world: the number of ranks.
    """

    index: int
    world: int

    @classmethod
    def current(cls) -> Rank:
        return cls(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())

    def slice(self, size: int) -> slice:
        """Its part of ``size`` equal items; parts differ by one at most."""
        return slice(size * self.index // self.world, size * (self.index + 1) // self.world)


@dataclass(frozen=True)
class Heads:
    """The heads of one layer on a rank.

    Attributes:
        key_map, value_map: the rank's maps.
        kept: the query, K and V heads that the rank holds, by their number in the checkpoint.
        whole: how many of each the checkpoint has.
        stored: heads of K and V in a cell of the cache: the most on any rank, since vLLM has one
            layout for all of them. It also has one number of blocks, so this costs no tokens.
    """

    key_map: HeadMap
    value_map: HeadMap
    kept: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    whole: tuple[int, int, int]
    stored: tuple[int, int]

    @classmethod
    def of(cls, key_map: HeadMap, value_map: HeadMap, rank: Rank) -> Heads:
        whole = (key_map.num_heads, key_map.num_kv_heads, value_map.num_kv_heads)
        if rank.world == 1:
            every = (tuple(range(whole[0])), tuple(range(whole[1])), tuple(range(whole[2])))
            return cls(key_map, value_map, every, whole, whole[1:])
        apart = None if value_map == key_map else value_map
        shards = [key_map.shard(r, rank.world, value_head_map=apart) for r in range(rank.world)]
        own = shards[rank.index]
        return cls(
            own.head_map,
            own.value_head_map or own.head_map,
            (own.query_heads, own.kv_heads, own.value_heads),
            whole,
            (max(len(s.kv_heads) for s in shards), max(len(s.value_heads) for s in shards)),
        )

    @property
    def counts(self) -> list[int]:
        """Query, K and V heads of the rank."""
        return [len(heads) for heads in self.kept]


@contextmanager
def one_rank() -> Iterator[None]:
    """Layers made meanwhile are not cut: vLLM sees a group of this rank alone."""
    with patch.object(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1)):
        yield


def set_feed_forward(config: Any, rank: Rank) -> None:
    """Set the width of the feed-forward layers in a config to that of the rank's part."""
    for name in FEED_FORWARD_SIZES:
        if not hasattr(config, name):
            continue
        whole = getattr(config, name) or 4 * config.hidden_size  # GPT-2's default
        part = rank.slice(whole)
        setattr(config, name, part.stop - part.start)


def load_heads(qkv: ColumnParallelLinear, heads: Heads, dims: tuple[int, int, int]) -> None:
    """Let a projection to Q, K and V load the rank's heads.

    Args:
        dims: head dims of Q, K and V.
    """
    kept = [_columns(h, dim) for h, dim in zip(heads.kept, dims, strict=True)]
    sizes = [count * dim for count, dim in zip(heads.whole, dims, strict=True)]

    def part(whole: Tensor, shard: Any) -> Tensor:
        if shard is not None:
            return whole[kept["qkv".index(shard)]]
        return torch.cat([x[one] for x, one in zip(whole.split(sizes), kept, strict=True)])

    _load_part(qkv, part, ("weight", "bias"))


def sum_heads(output: RowParallelLinear, heads: Heads, dim: int, rank: Rank) -> None:
    """Let an output projection load the columns of the rank's query heads, and sum over the ranks.

    Args:
        dim: head dim of V.
    """
    kept = _columns(heads.kept[0], dim)
    _load_part(output, lambda whole, _: whole[:, kept], ("weight",))
    SummedLinear.convert(output, rank)


def cut_feed_forward(model: nn.Module, rank: Rank) -> None:
    """Let all linear layers but those of attention load the rank's part, and sum over the ranks."""

    def rows(whole: Tensor, shard: Any) -> Tensor:
        return whole[rank.slice(len(whole))]

    def columns(whole: Tensor, shard: Any) -> Tensor:
        return whole[:, rank.slice(whole.shape[1])]

    for layer in model.modules():
        if isinstance(layer, RowParallelLinear) and not isinstance(layer, SummedLinear):
            _load_part(layer, columns, ("weight",))
            SummedLinear.convert(layer, rank)
        elif type(layer) in (ColumnParallelLinear, MergedColumnParallelLinear):
            _load_part(layer, rows, ("weight", "bias"))


class SummedLinear(RowParallelLinear):
    """A linear layer over the rank's part of the inputs; the outputs are summed over the ranks."""

    adds_bias: bool

    @classmethod
    def convert(cls, layer: RowParallelLinear, rank: Rank) -> None:
        layer.__class__ = cls
        layer.adds_bias = rank.index == 0 and not layer.skip_bias_add

    def forward(self, x: Tensor) -> Any:
        out = self.quant_method.apply(self, x, self.bias if self.adds_bias else None)
        if self.reduce_results:
            out = tensor_model_parallel_all_reduce(out)
        if not self.return_bias:
            return out
        return out, self.bias if self.skip_bias_add else None


def _load_part(layer: nn.Module, part: PartOf, names: tuple[str, ...]) -> None:
    """Cut what the checkpoint has before a layer's parameters load it."""
    for name in names:
        parameter = getattr(layer, name)
        if parameter is None:
            continue

        def load(param, whole, shard=None, *, load_all=parameter.weight_loader):
            load_all(param, part(whole, shard), *([] if shard is None else [shard]))

        parameter.weight_loader = load


def _columns(heads: tuple[int, ...], dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()
