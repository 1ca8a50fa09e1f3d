"""save() and load(): converted models as ordinary Hugging Face checkpoint folders.

The weights are safetensors under their usual names and the maps are in ``config.json``, so that
LLaMA, Mistral and Qwen checkpoints with one count of KV heads load with ``from_pretrained`` too,
once ``asym_gqa`` is registered. ``load`` loads every family and every map.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..models.families import FAMILIES, Family, family_of
from ..models.maps import (
    IMPLEMENTATION,
    guard,
    guarded_architecture,
    is_uneven,
    stock_architecture,
    stored_maps,
)
from .model import resize, set_maps


def save(model: nn.Module, folder: str | Path, *, processor: Any = None) -> Path:
    """Write a model as a checkpoint folder; nothing is left behind if that fails half-way.

    Args:
        model: what ``convert`` or ``load`` returned, or any other Hugging Face model.
        folder: must not exist, or be empty.
        processor: a tokenizer or image processor to put beside it.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must not exist or be empty, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    guard(model.config)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        if is_uneven(model.config):
            _rename_architectures(unfinished / "config.json")
        if processor is not None:
            processor.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def load(folder: str | Path, **options: Any) -> nn.Module:
    """Load a checkpoint folder, converted or not, in eval mode.

    Args:
        folder: what ``save`` or ``save_pretrained`` wrote.
        options: of ``from_pretrained`` (``dtype``, ``device_map``, ...). ``attn_implementation`` is
            ``"asym_gqa"`` by default where the config has maps.

    Raises:
        ValueError: no checkpoint there, weights missing, truncated or of another shape, or maps
            that don't fit the model.
        NotImplementedError: the config has maps and the family is not known.
    """
    import transformers
    from safetensors import SafetensorError

    from ..integrations.transformers import register

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must be a checkpoint with a config.json, got {folder}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = _model_class(config)
        maps = stored_maps(config)
        if maps is not None:
            register(IMPLEMENTATION)
            options = {"attn_implementation": IMPLEMENTATION, **options}
            # The file's own wish would win over another name, see models.maps.STRICT_FIELD.
            config._attn_implementation = options["attn_implementation"]
            options = {"config": config, **options}
            model_class = _resized(model_class, _family(config), maps)
        model, info = model_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} must be a complete checkpoint: {error}") from error
    _check_loaded(folder, info)
    if maps is not None:
        model.__class__ = model_class.__base__
        set_maps(model, family_of(model), maps)
    return model


def _rename_architectures(file: Path) -> None:
    """Name model classes that only this package registers in engines.

    An engine that does not know the class refuses to load the model. It would ignore the maps.
    """
    config = json.loads(file.read_text())
    config["architectures"] = [guarded_architecture(n) for n in config["architectures"]]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _model_class(config: Any) -> type[nn.Module]:
    import transformers

    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, stock_architecture(names[0]), None) if names else None
    if found is None:
        raise ValueError(
            f"config.architectures must name a model class of transformers, got {names}"
        )
    return found


def _family(config: Any) -> Family:
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise NotImplementedError(f"a {config.model_type!r} model with head maps can't be loaded")


def _resized(model_class: type[nn.Module], family: Family, maps: list) -> type[nn.Module]:
    """The class with its projections resized when it is made, before weights are loaded."""

    def make(self, config, *args, **options):
        model_class.__init__(self, config, *args, **options)
        resize(self, family, maps)

    # By name and module transformers finds how weights are renamed between file and model.
    members = {"__init__": make, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), members)


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            found = sorted(map(str, info[problem]))
            raise ValueError(
                f"{folder} must hold all weights in the shapes of its config, got "
                f"{len(found)} {problem.replace('_', ' ')}, the first {found[0]}"
            )
