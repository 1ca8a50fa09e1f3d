"""save() and load(): converted models as ordinary Hugging Face checkpoint folders.

The weights are safetensors under their usual names and the maps are in ``config.json``, so that
LLaMA, Mistral and Qwen checkpoints with one count of KV heads load with ``from_pretrained`` too,
once ``asym_gqa`` is registered. ``load`` loads every family and every map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..head_map import HeadMap
from ..integrations.transformers.guards import guard_saving
from ..models.checkpoint_files import CONFIG, check_indices
from ..models.families import FAMILIES, Family, attention_modules, family_of
from ..models.maps import (
    IMPLEMENTATION,
    guard,
    stock_architecture,
    stored_maps,
)
from ..reporting.files import check_new_folder, new_folder
from .model import resize, set_maps

Maps = list[tuple[HeadMap, HeadMap]]


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

    Examples:
        >>> save(child, "child", processor=tokenizer)
    """
    folder = check_new_folder("folder", folder)
    guard(model.config)
    guard_saving(model)
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)
    return folder


def load(folder: str | Path, **options: Any) -> nn.Module:
    """Load a checkpoint folder, converted or not, in eval mode.

    Args:
        folder: what ``save`` or ``save_pretrained`` wrote.
        options: of ``from_pretrained`` (``dtype``, ``device_map``, ...). ``attn_implementation`` is
            ``"asym_gqa"`` by default if the config has maps.

    Raises:
        ValueError: no checkpoint there, a config that transformers can't make a model of, weights
            missing, truncated or of another shape, or maps that don't fit the model.
        NotImplementedError: the config has maps and the family is not known.

    Examples:
        >>> child = load("child")
    """
    folder = Path(folder)
    config, model_class, maps = read_config(folder)
    whole = model_class if maps is None else resized(model_class, config, maps)
    if maps is not None:
        options = {"attn_implementation": IMPLEMENTATION, **options}
    return finish(folder, load_weights(folder, whole, config, options), model_class, maps)


def read_config(folder: Path) -> tuple[Any, type[nn.Module], Maps | None]:
    """The config of a checkpoint, its model class in transformers, and its maps.

    Registers ``asym_gqa`` if there are maps.

    Raises:
        ValueError, NotImplementedError: as ``load``.
    """
    import transformers

    from ..integrations.transformers import register

    if not (folder / CONFIG).is_file():
        raise ValueError(f"folder must be a checkpoint with a {CONFIG}, got {folder}")
    check_indices(folder)
    with as_value_errors(folder):
        config = transformers.AutoConfig.from_pretrained(folder)
    model_class, maps = _model_class(config), stored_maps(config)
    if maps is not None:
        _check_heads(config, maps)
        register(IMPLEMENTATION)
    return config, model_class, maps


def load_weights(
    folder: Path, model_class: type[nn.Module], config: Any, options: dict[str, Any]
) -> nn.Module:
    """A model of a class with the weights of a checkpoint.

    Raises:
        ValueError: weights that are missing, truncated or of another shape.
    """
    if "attn_implementation" in options:
        # Otherwise the one in the file would win over another name, see models.maps.STRICT_FIELD.
        config._attn_implementation = options["attn_implementation"]
        options = {"config": config, **options}
    with as_value_errors(folder):
        model, info = model_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_loaded(folder, info)
    return model


def finish(
    folder: Path, model: nn.Module, model_class: type[nn.Module], maps: Maps | None
) -> nn.Module:
    """Make a loaded model one of transformers' own class, with its maps."""
    model.__class__ = model_class
    if maps is None:
        return model
    family = family_of(model)
    layers = list(attention_modules(model, family))
    if len(layers) != len(maps):
        raise ValueError(
            f"{folder / CONFIG} must have a head map for each of {len(layers)} attention layers, "
            f"got {len(maps)}"
        )
    set_maps(model, family, maps)
    return model


@contextmanager
def as_value_errors(folder: Path) -> Iterator[None]:
    """transformers raises anything on a config or weights that it can't read."""
    try:
        yield
    except (NotImplementedError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"{folder} must be a complete checkpoint: {type(error).__name__}: {error}"
        ) from error


def _check_heads(config: Any, maps: Maps) -> None:
    heads = getattr(config, _family(config).num_heads)
    for layer, pair in enumerate(maps):
        for head_map in pair:
            if head_map.num_heads > heads or head_map.num_heads != pair[0].num_heads:
                raise ValueError(
                    f"head maps of a config must have an entry for each query head left of {heads},"
                    f" the same number for K and V, got {head_map.num_heads} in layer {layer}"
                )


def _model_class(config: Any) -> type[nn.Module]:
    import transformers

    names = getattr(config, "architectures", None)
    names = names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []
    found = getattr(transformers, stock_architecture(names[0]), None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"config.architectures must name a model class of transformers, got {names}"
        )
    return found


def _family(config: Any) -> Family:
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise NotImplementedError(f"a {config.model_type!r} model with head maps can't be loaded")


def resized(model_class: type[nn.Module], config: Any, maps: Maps) -> type[nn.Module]:
    """The class with the projections of these maps, made before weights are loaded.

    Raises:
        NotImplementedError: the family is not known.
    """
    family = _family(config)
    return made_with(model_class, lambda model: resize(model, family, maps))


def made_with(model_class: type[nn.Module], change: Callable[[nn.Module], None]) -> type[nn.Module]:
    """The class with a change at the end of its ``__init__``."""

    def make(self, config, *args, **options):
        model_class.__init__(self, config, *args, **options)
        change(self)

    # transformers finds the renames between file and model by the class's name and module.
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
