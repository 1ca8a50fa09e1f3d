"""Files and folders that are written completely or not at all, with the modes of the umask."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, data: bytes | str) -> Path:
    """Write a file atomically: a reader, or a crash, leaves the old content or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    try:
        with open(unfinished, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path


def read_state(path: Path) -> dict[str, Any]:
    """Read a file that ``torch.save`` wrote. No code in the file is run.

    Raises:
        ValueError: the file is truncated, or is not a state.
    """
    import torch  # imported here, because commands without torch write files, too

    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} must be a complete state: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a state, got a {type(content).__name__}")
    return content


def check_new_folder(name: str, folder: str | Path) -> Path:
    """The absolute path of a folder that a result can be written to.

    Call it before the work starts.

    Args:
        name: the caller's name of the folder, for the message.

        Raises:
            ValueError: the folder is not empty, is not a folder, or can't be created.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{name} must not exist or be empty, got {folder}")
    _check_writable(name, folder.parent)
    return folder


def check_output_folder(name: str, folder: str | Path) -> Path:
    """The same for a folder that may hold files already.

    Raises:
        ValueError: the path is not a folder, or nothing can be written there.
    """
    folder = Path(folder).absolute()
    _check_writable(name, folder)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears when the block ends. If the block fails, it doesn't appear.

    Files and subfolders get the modes of the umask, whatever the library that wrote them chose:
    safetensors writes files that only their owner can read.

    Args:
        folder: as ``check_new_folder`` returns it.

    Yields:
        a temporary folder beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        _apply_umask(unfinished)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that is not in use."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _apply_umask(folder: Path) -> None:
    """Give all files in a folder the mode of a new file, and subfolders that of ``folder``."""
    new = folder / f".{secrets.token_hex(6)}"
    new.touch()
    file_mode, folder_mode = (stat.S_IMODE(path.stat().st_mode) for path in (new, folder))
    new.unlink()
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(folder_mode if path.is_dir() else file_mode)


def _check_writable(name: str, folder: Path) -> None:
    """Raise ValueError unless files can be created in ``folder``, which may not exist yet."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{name} must lie in a folder, got {folder}, and {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be writable, got {folder}: no permission in {existing}")
