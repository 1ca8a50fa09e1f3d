"""Tensor parallelism over uneven head maps, for inference with Hugging Face models.

:func:`shard_model` keeps one rank's part of every layer: the query heads that
:meth:`gqa_kernels.HeadMap.shard` assigns to it, only the KV heads that these read, and an equal
slice of the feed-forward layers. Sizes need not be multiples of the number of ranks.
:mod:`.shard_checkpoint` does the same to a checkpoint on disk, tensor by tensor. transformers' own
plan (``config.base_model_tp_plan``) determines which layers are split, and how.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..head_map import HeadMapShard
from ..integrations.transformers import register
from ..integrations.transformers.guards import guard_layer
from ..models.maps import layer_maps, store_maps

# For each projection of attention: which of a shard's heads it keeps, as outputs (0) or inputs (1).
HEADS = {
    "q_proj": ("query_heads", 0),
    "k_proj": ("kv_heads", 0),
    "v_proj": ("value_heads", 0),
    "o_proj": ("query_heads", 1),
}
COLUMNS, ROWS = "colwise", "rowwise"  # transformers' names: split outputs; split inputs, summed
REPLICATED = "replicated_with_grad_allreduce"


def shard_model(
    model: nn.Module,
    rank: int,
    world: int,
    *,
    group: dist.ProcessGroup | None = None,
    query_cost: int = 1,
    kv_cost: int = 1,
) -> nn.Module:
    """Split ``model`` in place: keep rank ``rank``'s part, and return it.

    The model then runs with ``attn_implementation="asym_gqa"``. Every rank must call it with the
    same inputs and receives the complete outputs. KV caches hold only the rank's own KV heads.

    Args:
        model: a Hugging Face model whose ``config.base_model_tp_plan`` names ``q_proj``,
            ``k_proj``, ``v_proj`` and ``o_proj``, with or without head maps in its config.
        rank, world: this rank and the number of ranks, at most the number of query heads.
        group: process group in which outputs are summed; default the world.
        query_cost, kv_cost: as for :meth:`gqa_kernels.HeadMap.shard`.

    Raises:
        NotImplementedError: the model has no such plan, or the plan has an unknown rule.
        ValueError: ``rank`` or ``world`` is out of range.

    Examples:
        >>> model = shard_model(model, rank=dist.get_rank(), world=dist.get_world_size())
    """
    rules = rules_of(model)
    shards = {
        name: shard_of(model, name, rank, world, query_cost, kv_cost)
        for name in attention_names(rules)
    }
    cut(model, rules, shards, rank, world, group)
    store_shard_maps(model, shards)
    model.set_attn_implementation(register())
    return model


@dataclass(frozen=True)
class Cut:
    """The part of a linear layer that a rank keeps.

    Attributes:
        dim: 0 if outputs are split, 1 if inputs are.
        kept: indices along it.
    """

    dim: int
    kept: Tensor


def cuts_of(
    model: nn.Module,
    rules: dict[str, str],
    shards: dict[str, HeadMapShard],
    rank: int,
    world: int,
) -> dict[str, Cut]:
    """The part that rank ``rank`` keeps of every linear layer that is split.

    Args:
        model: the whole model; its weights are not read.
        rules: rules by module name, from :func:`rules_of`.
        shards: the rank's heads, by the attention module's name.
    """
    cuts = {}
    for name, rule in rules.items():
        module = model.base_model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        if parent in shards and last in HEADS:
            (kind, dim), head_dim = HEADS[last], model.base_model.get_submodule(parent).head_dim
            cuts[name] = Cut(dim, _rows_of(getattr(shards[parent], kind), head_dim))
        elif rule == COLUMNS:
            cuts[name] = Cut(0, _slice(module.out_features, rank, world))
        elif rule == ROWS:
            cuts[name] = Cut(1, _slice(module.in_features, rank, world))
    return cuts


def cut(
    model: nn.Module,
    rules: dict[str, str],
    shards: dict[str, HeadMapShard],
    rank: int,
    world: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Split the projections of a model in place. If inputs are split, sum outputs over the
    ranks."""
    for name, one in cuts_of(model, rules, shards, rank, world).items():
        module = model.base_model.get_submodule(name)
        _keep(module, one)
        if one.dim == 1:
            _sum_over_ranks(module, rank, group)


def store_shard_maps(model: nn.Module, shards: dict[str, HeadMapShard]) -> None:
    """Write a rank's maps into its model's config, and guard its attention layers."""
    pairs = [(shard.head_map, shard.value_head_map or shard.head_map) for shard in shards.values()]
    for name, pair in zip(shards, pairs, strict=True):
        guard_layer(model.base_model.get_submodule(name), *pair)
    store_maps(model.config, *zip(*pairs, strict=True))


def attention_names(rules: dict[str, str]) -> list[str]:
    """Names of the attention modules, in order."""
    return [name.removesuffix(".q_proj") for name in rules if name.endswith(".q_proj")]


def shard_of(
    model: nn.Module, name: str, rank: int, world: int, query_cost: int, kv_cost: int
) -> HeadMapShard:
    """The heads of rank ``rank`` in the attention module ``name`` of a whole model."""
    module = model.base_model.get_submodule(name)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    counts = (projection.out_features // module.head_dim for projection in projections)
    head_map, value_map = layer_maps(model.config, module.layer_idx, *counts)
    return head_map.shard(
        rank, world, value_head_map=value_map, query_cost=query_cost, kv_cost=kv_cost
    )


def rules_of(model: nn.Module) -> dict[str, str]:
    """The rule of every module that transformers' plan names."""
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    missing = [p for p in HEADS if not any(key.endswith("." + p) for key in plan)]
    if missing:
        raise NotImplementedError(
            f"config.base_model_tp_plan of a {model.config.model_type} model must name "
            f"{', '.join(HEADS)}, {', '.join(missing)} not found"
        )
    for key, rule in plan.items():
        if rule not in (COLUMNS, ROWS, REPLICATED):
            raise NotImplementedError(
                f"config.base_model_tp_plan[{key!r}] must be {COLUMNS}, {ROWS} or {REPLICATED}, "
                f"got {rule!r}"
            )
    patterns = {
        re.compile(re.escape(key).replace(r"\*", r"[^.]+")): rule for key, rule in plan.items()
    }
    return {
        name: rule
        for name, _ in model.base_model.named_modules()
        for pattern, rule in patterns.items()
        if pattern.fullmatch(name)
    }


def _rows_of(heads: tuple[int, ...], head_dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _slice(size: int, rank: int, world: int) -> Tensor:
    return torch.arange(size * rank // world, size * (rank + 1) // world)


def _keep(linear: nn.Linear, one: Cut) -> None:
    kept = one.kept.to(linear.weight.device)
    weight = linear.weight.detach().index_select(one.dim, kept)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
    if one.dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, kept), requires_grad=False)


def _sum_over_ranks(linear: nn.Linear, rank: int, group: dist.ProcessGroup | None) -> None:
    """Sum the outputs of all ranks. The bias counts once."""
    if linear.bias is not None and rank > 0:
        linear.bias = None

    def all_reduce(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and output.requires_grad:
            raise NotImplementedError(
                "a model cut by shard_model is for inference: call it under torch.no_grad()"
            )
        dist.all_reduce(output, group=group)
        return output

    linear.register_forward_hook(all_reduce)
