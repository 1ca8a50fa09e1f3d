"""Tensor parallelism over uneven head maps, for inference with Hugging Face models.

:func:`shard_model` keeps one rank's part of every layer: the query heads that
:meth:`gqa_kernels.HeadMap.shard` gives it with just the KV heads that these read, and an equal
slice of the feed-forward layers. Layer counts that do not divide by the number of ranks are fine.
What is cut how is read from transformers' own plan (``config.base_model_tp_plan``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..head_map import HeadMap, HeadMapShard
from ..model_maps import layer_maps, store_maps
from .transformers import register

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
COLUMNS, ROWS = "colwise", "rowwise"  # transformers' names: outputs cut, inputs cut and summed
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
    """Cut ``model`` in place to rank ``rank``'s part, and return it.

    The model then runs on ``attn_implementation="asym_gqa"``. Every rank must call it with the same
    inputs; outputs are whole on every rank. KV caches hold the rank's own KV heads only.

    Args:
        model: a Hugging Face model whose ``config.base_model_tp_plan`` names ``q_proj``,
            ``k_proj``, ``v_proj`` and ``o_proj``, with or without head maps in its config.
        rank, world: this rank and the number of ranks, at most the number of query heads.
        group: process group of the sums; default the world's.
        query_cost, kv_cost: as :meth:`gqa_kernels.HeadMap.shard` takes them.

    Raises:
        NotImplementedError: the model has no such plan, or it has a rule not known here.
        ValueError: ``rank`` or ``world`` is out of range.
    """
    rules = _rules(model)
    shards, modules = [], list(_attention_modules(model, rules))
    for module in modules:
        shards.append(_cut_attention(model.config, module, rank, world, query_cost, kv_cost))
    for name, rule in rules.items():
        module = model.base_model.get_submodule(name)
        in_attention = name.rpartition(".")[2] in PROJECTIONS.values()
        if rule == COLUMNS and not in_attention:
            _keep(module, rows=_slice(module.out_features, rank, world))
        if rule == ROWS:
            if not in_attention:
                _keep(module, columns=_slice(module.in_features, rank, world))
            _sum_over_ranks(module, rank, group)
    store_maps(
        model.config,
        [shard.head_map for shard in shards],
        [shard.value_head_map or shard.head_map for shard in shards],
    )
    model.set_attn_implementation(register())
    return model


def _rules(model: nn.Module) -> dict[str, str]:
    """The rule of every module that transformers' plan names."""
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    missing = [p for p in PROJECTIONS.values() if not any(key.endswith("." + p) for key in plan)]
    if missing:
        raise NotImplementedError(
            f"config.base_model_tp_plan of a {model.config.model_type} model must name "
            f"{', '.join(PROJECTIONS.values())}, {', '.join(missing)} not found"
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


def _attention_modules(model: nn.Module, rules: dict[str, str]) -> Iterator[nn.Module]:
    for name in rules:
        parent, _, last = name.rpartition(".")
        if last == PROJECTIONS["query"]:
            yield model.base_model.get_submodule(parent)


def _cut_attention(
    config, module: nn.Module, rank: int, world: int, query_cost: int, kv_cost: int
) -> HeadMapShard:
    query, key, value, output = (getattr(module, name) for name in PROJECTIONS.values())
    head_dim = module.head_dim
    num_heads, num_k_heads, num_v_heads = (
        projection.out_features // head_dim for projection in (query, key, value)
    )
    head_map, value_map = layer_maps(config, module.layer_idx, num_heads, num_k_heads, num_v_heads)
    shard = head_map.shard(
        rank, world, value_head_map=value_map, query_cost=query_cost, kv_cost=kv_cost
    )
    _keep(query, rows=_rows_of(shard.query_heads, head_dim))
    _keep(key, rows=_rows_of(shard.kv_heads, head_dim))
    _keep(value, rows=_rows_of(shard.value_heads, head_dim))
    _keep(output, columns=_rows_of(shard.query_heads, head_dim))
    # What transformers' own attention repeats K and V by; 0 makes it fail on uneven groups.
    local: HeadMap = shard.head_map
    uniform = local.is_uniform and shard.value_head_map is None
    module.num_key_value_groups = local.num_heads // local.num_kv_heads if uniform else 0
    return shard


def _rows_of(heads: tuple[int, ...], head_dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _slice(size: int, rank: int, world: int) -> Tensor:
    return torch.arange(size * rank // world, size * (rank + 1) // world)


def _keep(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep some outputs (rows of the weight) or some inputs (columns) of a linear layer."""
    dim, index = (0, rows) if rows is not None else (1, columns)
    weight = linear.weight.detach().index_select(dim, index.to(linear.weight.device))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
    if rows is not None and linear.bias is not None:
        bias = linear.bias.detach().index_select(0, rows.to(linear.bias.device))
        linear.bias = nn.Parameter(bias, requires_grad=False)


def _sum_over_ranks(linear: nn.Linear, rank: int, group: dist.ProcessGroup | None) -> None:
    """Add up the outputs of all ranks; the bias counts once."""
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
