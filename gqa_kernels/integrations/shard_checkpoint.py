"""Checkpoints cut into the ranks of tensor parallelism, on disk.

:func:`shard_checkpoint` reads a checkpoint tensor by tensor and writes a folder per rank: its part
of the weights as safetensors, the config, and ``shard.json``, which says what heads and maps the
rank has in each layer. :func:`load_shard` loads one rank's folder alone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..convert import checkpoint
from ..convert.model import set_maps
from ..head_map import HeadMap, HeadMapShard
from ..models.families import family_of
from ..models.maps import IMPLEMENTATION, stored_maps
from .tensor_parallel import Cut, attention_names, cut, cuts_of, rules_of, shard_of, tell_maps
from .transformers import register

SHARD = "shard.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def shard_checkpoint(
    folder: str | Path, out: str | Path, world: int, *, query_cost: int = 1, kv_cost: int = 1
) -> Path:
    """Cut a checkpoint into ``out/rank-0`` up to ``out/rank-{world - 1}``.

    At most one rank's part of one weights file is in memory. Nothing is left behind if it fails.

    Args:
        folder: a Hugging Face checkpoint in safetensors, converted or not, of a model as
            :func:`.tensor_parallel.shard_model` takes it.
        out: must not exist, or be empty.
        world: number of ranks, at most the number of query heads.
        query_cost, kv_cost: as :meth:`gqa_kernels.HeadMap.shard` takes them.

    Returns:
        ``out``.

    Raises:
        ValueError: no complete checkpoint there, ``out`` holds something, or ``world`` is out of
            range.
        NotImplementedError: the model can't be cut, or its weights are quantised.
    """
    folder, out = Path(folder), Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must not exist or be empty, got {out}")
    files = _weight_files(folder)
    model = _empty_model(folder)
    rules = rules_of(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
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
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return out


def load_shard(
    folder: str | Path, *, group: dist.ProcessGroup | None = None, **options: Any
) -> nn.Module:
    """Load this rank's part of what :func:`shard_checkpoint` wrote, in eval mode.

    Args:
        folder: the folder of all ranks; only this rank's is read.
        group: process group of the sums; default the world's.
        options: of ``from_pretrained`` (``dtype``, ...).

    Returns:
        a model as :func:`.tensor_parallel.shard_model` makes it.

    Raises:
        ValueError: the folder was cut for another number of ranks, or is not complete.
    """
    from safetensors import SafetensorError

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = Path(folder) / f"rank-{rank}"
    if not (own / SHARD).is_file():
        raise ValueError(f"folder must hold rank-{rank}/{SHARD}, got {folder}")
    content = json.loads((own / SHARD).read_text())
    if (content["rank"], content["world"]) != (rank, world):
        raise ValueError(
            f"{own} must be for rank {rank} of {world}, got rank {content['rank']} of "
            f"{content['world']}"
        )
    shards = _from_json(content["layers"])
    register(IMPLEMENTATION)
    config, whole_class, maps = _whole(own)

    def make(self, config, *args, **others):
        whole_class.__init__(self, config, *args, **others)
        cut(self, rules_of(self), shards, rank, world, group)

    # By name and module transformers finds how weights are renamed between file and model.
    members = {"__init__": make, "__module__": whole_class.__module__}
    cut_class = type(whole_class.__name__, (whole_class,), members)
    options = {"attn_implementation": IMPLEMENTATION, **options}
    try:
        model, info = cut_class.from_pretrained(
            own, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{own} must be a complete checkpoint: {error}") from error
    checkpoint._check_loaded(own, info)
    model.__class__ = checkpoint._model_class(config)
    if maps is not None:
        set_maps(model, family_of(model), maps)
    tell_maps(model, shards)
    return model


def _whole(folder: Path) -> tuple[Any, type[nn.Module], list | None]:
    """The config of a checkpoint, the class of its uncut model, and its maps."""
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must be a checkpoint with a config.json, got {folder}")
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise NotImplementedError(f"{folder} must not be quantised to be cut over ranks")
    model_class, maps = checkpoint._model_class(config), stored_maps(config)
    if maps is not None:
        register(IMPLEMENTATION)
        model_class = checkpoint._resized(model_class, checkpoint._family(config), maps)
    return config, model_class, maps


def _empty_model(folder: Path) -> nn.Module:
    """The uncut model of a checkpoint, without memory for its weights."""
    config, model_class, _ = _whole(folder)
    with torch.device("meta"):
        return model_class(config)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        files = [folder / name for name in dict.fromkeys(names)]
    else:
        files = [folder / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} must hold its weights as safetensors, {missing[0]} not found")
    return files


def _copy_rest(folder: Path, target: Path) -> None:
    """Config, tokenizer and the like: all but weights."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and file.name != INDEX:
            shutil.copy(file, target / file.name)


def _write_weights(
    files: list[Path], target: Path, cuts: dict[str, Cut], prefix: str, rank: int
) -> None:
    """A rank's part of every file under its name, and their index where there are several.

    Args:
        cuts: by module name, which in the files may come behind ``prefix``.
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
    """What a rank keeps of a tensor; None of a bias that the first rank adds for all."""
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
