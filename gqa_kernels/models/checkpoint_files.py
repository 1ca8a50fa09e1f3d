"""The files of a checkpoint folder. Its origin is not trusted, so nothing outside it is read."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_indices(folder: Path) -> None:
    """Raise ValueError unless every weight index names files in the folder itself."""
    for index in sorted(folder.glob("*.index.json")):
        indexed_files(index)


def indexed_files(index: Path) -> list[Path]:
    """The weight files that an index names, in its order.

    Raises:
        ValueError: the file is not an index, or a name points outside the folder.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = list(dict.fromkeys(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} must be an index with a weight_map: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{index} must name files in its own folder, got {name!r}")
    return [index.with_name(name) for name in names]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: there are none, or files that the index names are missing.
    """
    index = folder / INDEX
    files = indexed_files(index) if index.is_file() else [folder / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} must hold its weights as safetensors, {missing[0]} not found")
    return files


def check_links(folder: Path) -> None:
    """Raise ValueError if a file is a link to a place outside the folder.

    Links into the blobs of the same repository are allowed in a snapshot of Hugging Face's cache
    (``models--*/snapshots/<commit>``), where all files are such links.
    """
    own = folder.resolve()
    allowed = [own]
    if own.parent.name == "snapshots" and own.parent.parent.name.startswith("models--"):
        allowed.append(own.parent.parent / "blobs")
    for file in folder.rglob("*"):
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(f"{folder} must hold its files itself, got a link: {file.name}")
