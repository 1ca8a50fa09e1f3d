"""Builds each method's model, its map and pooled KV heads, from a model with one KV head per query
head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grouping import search
from ..head_map import HeadMap
from .models import Transformer
from .settings import METHODS
from .tasks import Task

ALLOCATED = ("kdgqa", "dgqa-ema")  # start from the even map, which then follows the keys


def start(method: str, task: Task, trained: Transformer, seed: int) -> Transformer:
    """The method's model with the weights of ``trained`` and mean-pooled KV heads.

    Args:
        trained: a model with ``Hq`` KV heads.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    settings = task.settings
    if method == "mha":
        maps = [HeadMap.uniform(settings.num_heads, settings.num_heads)] * settings.num_layers
    elif method == "searched":
        maps = searched_maps(task, trained, seed)
    else:
        maps = [HeadMap.uniform(settings.num_heads, settings.num_kv_heads)] * settings.num_layers
    model = task.model(maps[0].num_kv_heads, method if method in ALLOCATED else None)
    state = {
        name: value for name, value in trained.state_dict().items() if not name.endswith("head_map")
    }
    for i, head_map in enumerate(maps):
        for side in ("k_proj", "v_proj"):
            name = f"blocks.{i}.attention.{side}.weight"
            state[name] = pool(state[name], head_map)
    model.load_state_dict(state, strict=False)  # maps and allocations have no weights
    for block, head_map in zip(model.blocks, maps, strict=True):
        block.attention.set_head_map(head_map)
    return model


def pool(weight: Tensor, head_map: HeadMap) -> Tensor:
    """Rows of a K or V projection ``[Hq * D, width]`` averaged over the groups of ``head_map``."""
    heads = weight.unflatten(0, (head_map.num_heads, -1))
    return torch.cat([heads[list(group)].mean(0) for group in head_map.groups])


def searched_maps(task: Task, model: Transformer, seed: int) -> list[HeadMap]:
    """For each layer, the map with the least loss when K and V heads are averaged, proven by
    search.

    The dissimilarity of two heads is the mean squared difference of their keys and values on a
    training batch, each divided by its own mean square. The objective of the search is then exactly
    the mean squared error of pooling.
    """
    settings = task.settings
    inputs, _ = task.batch(seed, -1)
    collected: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, out, name=name: collected.__setitem__(name, out.detach())
        )
        for name, module in model.named_modules()
        if name.endswith(("k_proj", "v_proj"))
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    maps = []
    for i in range(settings.num_layers):
        distances = torch.zeros(settings.num_heads, settings.num_heads, dtype=torch.float64)
        for side in ("k_proj", "v_proj"):
            x = collected[f"blocks.{i}.attention.{side}"].double().flatten(0, -2)
            x = x.unflatten(-1, (settings.num_heads, -1)).transpose(0, 1).flatten(1)
            distances += torch.cdist(x, x).square() / x.square().sum(1).mean()
        found = search(distances.numpy(), settings.num_kv_heads)
        maps.append(HeadMap(found.labels, settings.num_kv_heads))
    return maps
