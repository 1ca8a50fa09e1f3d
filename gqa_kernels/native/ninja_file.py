"""Writes ``build.ninja``, which compiles each file by a command of its own.

``setup.py`` imports this file without the package: it imports neither the package nor torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path


def write_ninja(
    folder: Path, root: Path, sources: Sequence[Path], command: Callable[[Path, Path], list[str]]
) -> list[Path]:
    """Write ``folder/build.ninja``.

    Args:
        folder: where ninja will run; created if it doesn't exist.
        root: folder of the sources. An object is named after its source's path below it.
        sources: the files to compile.
        command: the command that compiles a source to an object.

    Returns:
        The objects that ninja will make.
    """
    lines = ["rule compile", "  command = $command", "  depfile = $out.d", "  deps = gcc", ""]
    objects = []
    for source in sources:
        name = ".".join(source.relative_to(root).with_suffix(".o").parts)
        line = shlex.join([*command(source, Path(name)), "-MD", "-MF", f"{name}.d"])
        escaped = re.sub("([$ :])", r"$\1", str(source))
        lines.append(f"build {name}: compile {escaped}")
        lines.append(f"  command = {line.replace('$', '$$')}")
        objects.append(folder / name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return objects
