"""Objects compiled from csrc, kept by the content of all that goes into them.

A unit is compiled again only if it, or a file of ours that it includes, has other content: so a
patched copy of the sources costs the units that the patch reaches.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from gqa_kernels.native import compiler, cuda_build, env

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#include "(.+?)"', re.M)


class Replacement(NamedTuple):
    """Text to replace in a file, whose path is below ``csrc``; it must be there."""

    path: str
    old: str
    new: str


class KernelUnit(NamedTuple):
    """A compiled .cu file: its host code, and the PTX of its kernels."""

    object: Path
    ptx: Path


@lru_cache
def toolkit() -> cuda_build.Toolkit | None:
    """The CUDA toolkit that compiles the kernels."""
    return cuda_build.find_toolkit(env.cuda_home())


def unavailable_reason() -> str | None:
    """Why nothing can be emulated here, or None."""
    if toolkit() is None:
        return "nvcc is missing: install a CUDA toolkit, or pip install '.[test-cuda]'"
    return None


def source_tree(replace: Iterable[Replacement] = ()) -> Path:
    """``csrc``, or a copy of it with text replaced."""
    replace = tuple(replace)
    if not replace:
        return CSRC
    content = {p: p.read_bytes() for p in sorted(CSRC.rglob("*.*")) if p.is_file()}

    def write(folder: Path) -> None:
        copy = folder / "csrc"
        shutil.copytree(CSRC, copy)
        for name, old, new in replace:
            text = (copy / name).read_text()
            assert old in text, f"{name} has no {old!r}"
            (copy / name).write_text(text.replace(old, new))

    return kept("trees", [*content.values(), repr(replace)], write) / "csrc"


def kernel_unit(source: Path, virtual: str) -> KernelUnit:
    """Compile a .cu file for a virtual architecture (``"compute_80"``)."""

    def build(folder: Path) -> None:
        run(
            toolkit().nvcc, "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC", "-gencode",
            f"arch={virtual},code={virtual}", "--keep", "--keep-dir", folder,
            "-c", source, "-o", folder / "unit.o",
        )  # fmt: skip
        (folder / f"{source.stem}.ptx").rename(folder / "unit.ptx")
        for path in folder.iterdir():
            if path.name not in ("unit.o", "unit.ptx"):
                path.unlink()

    folder = kept("units", [*included(source), virtual, toolkit().version], build)
    return KernelUnit(folder / "unit.o", folder / "unit.ptx")


def host_unit(source: Path, *flags: str, reads: Iterable[Path] = ()) -> Path:
    """Compile a C++ file with the product's compiler and these flags.

    Args:
        reads: files that the flags make it include.
    """
    command = [*compiler.find_compiler().command, *flags]

    def build(folder: Path) -> None:
        run(*command, "-c", source, "-o", folder / "unit.o")

    content = [x for path in (source, *reads) for x in included(path)]
    return kept("units", [*content, repr(command), torch.__version__], build) / "unit.o"


def link(name: str, objects: Iterable[Path], *flags: object) -> Path:
    """A shared library of objects, whose paths identify their content."""
    objects = list(objects)
    command = [*compiler.find_compiler().command, "-shared"]

    def build(folder: Path) -> None:
        run(*command, "-o", folder / name, *objects, *flags)

    return kept("libraries", [repr((name, command, objects, flags))], build) / name


def included(source: Path) -> list[bytes]:
    """A file and every file of ours that it includes: names and contents."""
    found: dict[Path, bytes] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found[path] = path.read_bytes()
        names = INCLUDE.findall(found[path].decode())
        waiting += [(path.parent / name).resolve() for name in names]
    return [f"{path.name}\0".encode() + found[path] for path in sorted(found, key=lambda p: p.name)]


def kept(kind: str, content: Iterable[bytes | str], make: Callable[[Path], None]) -> Path:
    """The folder of the cache for this content, filled by ``make`` if it is not there yet."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.encode() if isinstance(part, str) else part)
    folder = env.cache_dir() / "emulation" / kind / digest.hexdigest()[:16]
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait, and find it
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            make(Path(scratch))
            Path(scratch).rename(folder)
            Path(scratch).mkdir()  # for its own removal
    return folder


def run(*command: object) -> None:
    """Run a command, whose errors are the message if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stderr[-4000:]}"
