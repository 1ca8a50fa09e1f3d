"""Splits checkpoints on disk across the ranks of tensor parallelism.

:func:`shard_checkpoint` reads a checkpoint tensor by tensor and writes a folder per rank: its part
of the weights as safetensors, the config, and ``shard.json`` with the rank's heads and maps of each
layer. :func:`load_shard` loads the folder of one rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..convert import checkpoint
from ..head_map import HeadMap, HeadMapShard
from ..integrations.transformers import register
from ..models.checkpoint_files import INDEX, check_links, weight_files
from ..models.maps import IMPLEMENTATION
from ..reporting.files import check_new_folder, new_folder
from .tensor import Cut, attention_names, cut, cuts_of, rules_of, shard_of, store_shard_maps

SHARD = "shard.json"
COPIED = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md")  # all but weights and code
LICENSES = ("LICENSE", "LICENCE", "NOTICE")


def shard_checkpoint(
    folder: str | Path, out: str | Path, world: int, *, query_cost: int = 1, kv_cost: int = 1
) -> Path:
    """Split a checkpoint into ``out/rank-0`` to ``out/rank-{world - 1}``.

    Memory holds at most one rank's part of one weights file. If it fails, it leaves nothing behind.

    Args:
        folder: a Hugging Face checkpoint in safetensors, converted or not, of a model that
            :func:`.tensor.shard_model` supports.
        out: must not exist, or be empty.
        world: number of ranks, at most the number of query heads.
        query_cost, kv_cost: as for :meth:`gqa_kernels.HeadMap.shard`.

    Returns:
        ``out``.

    Raises:
        ValueError: there is no complete checkpoint, an index or a link points outside the folder,
            ``out`` is not empty, or ``world`` is out of range.
        NotImplementedError: the model can't be split, or its weights are quantised.

    Examples:
        >>> shard_checkpoint("child", "child-shards", world=2)
    """
    folder, out = Path(folder), check_new_folder("out", out)
    if world < 1:
        raise ValueError(f"world must be at least 1 rank, got {world}")
    check_links(folder)
    files = weight_files(folder)
    model = _empty_model(folder)
    rules = rules_of(model)
    with new_folder(out) as unfinished:
        for rank in range(world):
            shards = {
                name: shard_of(model, name, rank, world, query_cost, kv_cost)
                for name in attention_names(rules)
            }
            target = unfinished / f"rank-{rank}"
            target.mkdir()
            _copy_rest(folder, target)
            cuts = cuts_of(model, rules, shards, rank, world)
            _write_weights(files, target, cuts, model.base_model_prefix + ".", rank)
            content = {"rank": rank, "world": world, "layers": _to_json(shards)}
            (target / SHARD).write_text(json.dumps(content, indent=1))
    return out


def load_shard(
    folder: str | Path, *, group: dist.ProcessGroup | None = None, **options: Any
) -> nn.Module:
    """Load this rank's part of a checkpoint that :func:`shard_checkpoint` wrote, in eval mode.

    Args:
        folder: the folder of all ranks. Only this rank's folder is read.
        group: process group in which outputs are summed; default the world.
        options: options of ``from_pretrained`` (``dtype``, ...).

    Returns:
        a model as :func:`.tensor.shard_model` makes it.

    Raises:
        ValueError: the folder was split for another number of ranks, or is incomplete.

    Examples:
        >>> dist.init_process_group()
        >>> model = load_shard("child-shards", dtype=torch.bfloat16)
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = Path(folder) / f"rank-{rank}"
    if not (own / SHARD).is_file():
        raise ValueError(f"folder must hold rank-{rank}/{SHARD}, got {folder}")
    content = _read_json(own / SHARD)
    shards = content["layers"]
    if (content["rank"], content["world"]) != (rank, world):
        raise ValueError(
            f"{own} must be for rank {rank} of {world}, got rank {content['rank']} of "
            f"{content['world']}"
        )
    register(IMPLEMENTATION)
    whole = _whole(own)
    cut_class = checkpoint.made_with(
        whole.made, lambda model: cut(model, rules_of(model), shards, rank, world, group)
    )
    options = {"attn_implementation": IMPLEMENTATION, **options}
    loaded = checkpoint.load_weights(own, cut_class, whole.config, options)
    model = checkpoint.finish(own, loaded, whole.model_class, whole.maps)
    store_shard_maps(model, shards)
    return model


class _Whole(NamedTuple):
    """A checkpoint before it is split.

    Attributes:
        made: its model class, built with the projections of its maps.
        model_class: its model class in transformers.
    """

    config: Any
    made: type[nn.Module]
    model_class: type[nn.Module]
    maps: checkpoint.Maps | None


def _whole(folder: Path) -> _Whole:
    config, model_class, maps = checkpoint.read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise NotImplementedError(f"{folder} must not be quantised to be cut over ranks")
    made = model_class if maps is None else checkpoint.resized(model_class, config, maps)
    return _Whole(config, made, model_class, maps)


def _empty_model(folder: Path) -> nn.Module:
    """The whole model of a checkpoint, without memory for its weights."""
    whole = _whole(folder)
    with checkpoint.as_value_errors(folder), torch.device("meta"):
        return whole.made(whole.config)


def _copy_rest(folder: Path, target: Path) -> None:
    """Copy config, tokenizer and texts, but no weights of any format."""
    for file in folder.iterdir():
        if not file.is_file() or file.name.endswith(".index.json"):
            continue
        if file.suffix in COPIED or file.name.startswith(LICENSES):
            shutil.copyfile(file, target / file.name)


def _write_weights(
    files: list[Path], target: Path, cuts: dict[str, Cut], prefix: str, rank: int
) -> None:
    """Write a rank's part of every file under the same name and, if there are several, their index.

    Args:
        cuts: by module name. The files may prepend ``prefix`` to these names.
    """
    from safetensors.torch import save_file

    weight_map, size = {}, 0
    for file in files:
        part = {}
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                module, _, kind = name.removeprefix(prefix).rpartition(".")
                kept = _part(tensors.get_tensor(name), kind, cuts.get(module), rank)
                if kept is not None:
                    part[name] = kept
        save_file(part, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
        size += sum(tensor.nbytes for tensor in part.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=1))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} must be a complete safetensors file: {error}") from error


def _part(tensor: Tensor, kind: str, one: Cut | None, rank: int) -> Tensor | None:
    """A rank's part of a tensor. None for a bias that the first rank adds for all."""
    if one is None:
        return tensor
    if kind == "bias" and one.dim == 1:
        return tensor if rank == 0 else None
    return tensor.index_select(one.dim, one.kept).contiguous()


def _to_json(shards: dict[str, HeadMapShard]) -> dict[str, dict[str, Any]]:
    layers = {}
    for name, shard in shards.items():
        maps = {"head_map": shard.head_map, "value_head_map": shard.value_head_map}
        layers[name] = {
            **{n: None if m is None else list(m.entries) for n, m in maps.items()},
            "query_heads": shard.query_heads,
            "kv_heads": shard.kv_heads,
            "value_heads": shard.value_heads,
        }
    return layers


def _read_json(path: Path) -> dict[str, Any]:
    """The description of a rank that ``shard_checkpoint`` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "rank": content["rank"],
            "world": content["world"],
            "layers": _from_json(content["layers"]),
        }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be what shard_checkpoint wrote: {error!r}") from error


def _from_json(layers: dict[str, dict[str, Any]]) -> dict[str, HeadMapShard]:
    shards = {}
    for name, layer in layers.items():
        value_map = layer["value_head_map"]
        shards[name] = HeadMapShard(
            HeadMap(layer["head_map"], len(layer["kv_heads"])),
            tuple(layer["query_heads"]),
            tuple(layer["kv_heads"]),
            None if value_map is None else HeadMap(value_map, len(layer["value_heads"])),
            tuple(layer["value_heads"]),
        )
    return shards
