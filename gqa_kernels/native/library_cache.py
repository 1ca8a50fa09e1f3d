"""Where compiled libraries are kept, and which of them may be loaded.

Loading a library runs its code. So a folder or a library is used only if it belongs to this user or
to root, and nobody else can write to it. A library's content must also have the hash that is stored
beside it: a file that a full disk truncated, or that another program put there, is compiled again
instead of loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

from . import env

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_said: set[str] = set()


def folders() -> list[Path]:
    """The folders to search for libraries: the user's and, if it exists, the fallback.

    A folder that can't be trusted is skipped, with one warning. Nothing is created.
    """
    found = []
    try:
        preferred = env.cache_dir()
        if preferred.exists():
            _check(preferred)
            found.append(preferred)
    except (OSError, ValueError) as error:
        _say(f"{error}. Compiled kernels are kept in a temporary folder instead.")
    fallback = _fallback()
    if _is_private(fallback):
        found.append(fallback)
    return found


def writable_folder() -> Path:
    """A folder for new libraries, created with mode 0700 if it doesn't exist.

    This is ``GQA_KERNELS_CACHE`` or the user's cache. If that can't be used, it is a private
    temporary folder, with a warning.

    Raises:
        OSError: there is no folder for temporary files either.
        OSError: there is no folder for temporary files either.
    """
    try:
        preferred = env.cache_dir()
        preferred.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(preferred)
        if os.access(preferred, os.W_OK | os.X_OK):
            return preferred
        problem = f"the kernel cache {preferred} is read-only"
    except (OSError, ValueError) as error:
        problem = str(error)
    fallback = _fallback()
    try:
        fallback.mkdir(mode=0o700)
    except FileExistsError:
        if not _is_private(fallback):  # another user may own it: its name is known
            fallback = _own_fallback()
    _say(
        f"{problem}. Compiled kernels are kept in {fallback} instead, where they may not last: "
        "set GQA_KERNELS_CACHE to a folder of your own."
    )
    return fallback


def preferred_is_writable() -> bool:
    """Whether a library can be stored in the user's folder. Nothing is created."""
    try:
        path = env.cache_dir()
        while not path.exists():
            path = path.parent
        return os.access(path, os.W_OK | os.X_OK)
    except (OSError, ValueError):
        return False


def candidates(pattern: str) -> list[Path]:
    """The libraries whose name matches, the preferred one first, not yet checked."""
    return [path for folder in folders() for path in sorted(folder.glob(pattern))]


def find(pattern: str) -> Path | None:
    """The first library whose name matches and that may be loaded."""
    return next(filter(is_intact, candidates(pattern)), None)


def is_intact(library: Path) -> bool:
    """Whether a library has the owner, mode and content that :func:`keep` left."""
    try:
        _check(library)
        return _hash_file(library).read_text() == _hash(library)
    except (OSError, ValueError):
        return False


def keep(built: Path, library: Path) -> None:
    """Copy a new library to its place. No other process sees a part of it.

    Its hash is written first: a reader that finds the new hash beside an old library starts a
    build, and so waits for the lock that the writer holds.
    """
    _write(_hash_file(library), _hash(built).encode())
    _write(library, built.read_bytes())
    library.chmod(0o755)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left in a cache. The caller must hold the lock of its builds."""
    for path in (*folder.glob(".new-*"), *folder.glob("build-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write(target: Path, content: bytes) -> None:
    """Write a file under another name, flush it to disk, and rename it."""
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _hash_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _hash(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _check(path: Path) -> None:
    """Raise ValueError if another user could have written this file or folder."""
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise ValueError(f"{path} belongs to user {status.st_uid}: it must be yours or root's")
    if status.st_mode & OTHERS_WRITE:
        raise ValueError(f"{path} is writable by other users: it must not be (chmod go-w {path})")


def _is_private(folder: Path) -> bool:
    """Whether a path is a folder, not a link, that belongs to this user alone."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    own = status.st_uid == os.geteuid() and not status.st_mode & OTHERS_WRITE
    return own and stat.S_ISDIR(status.st_mode)


def _fallback() -> Path:
    return Path(tempfile.gettempdir()) / f"gqa_kernels-{os.geteuid()}"


@lru_cache(maxsize=1)
def _own_fallback() -> Path:
    return Path(tempfile.mkdtemp(prefix="gqa_kernels-"))


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(f"gqa_kernels: {message}", stacklevel=2)
