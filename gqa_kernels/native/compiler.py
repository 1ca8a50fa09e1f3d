"""Compiling a library at first use, with ``torch.utils.cpp_extension.load`` and ninja.

Each part has a build folder per machine type, compiler, flags and torch version. It is kept, so
that ninja compiles only what changed since the last build. This module does what torch's function
can't:

- *A copy of the sources* lies in the build folder. Torch compiles files in place. Then each
  checkout would compile everything, and a file edited during a build would end up in a library that
  is named after the old content.
- *Units.* Torch names an object after its source without the folder, and several of our sources
  share a name. So each source gets a unit of its own, such as ``host.append.cpp``, which includes
  it.
- *A separate process.* Torch reads the compiler from the environment, which a process with threads
  must not change, and prints ninja's progress to standard output.
- *The compiler's arguments.* Torch quotes ``CXX`` as one word, so ``ccache g++`` becomes a script.
- *The lock.* Torch's lock is a file. A killed build leaves it behind, and every later build would
  wait for it forever. We use flock: it is released when the last process that holds it ends, ninja
  and the compilers included. So a compiler that outlives a killed build can't write into a new
  build.
- *The CUDA kernels*, whose files are compiled for different devices: see ``cuda_build.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from . import cuda_build, env
from .build_progress import BuildProgress, say
from .sources import COMPILE_FLAGS, cpu_sources

COMPILERS = ("c++", "g++", "clang++")
HOW_TO_INSTALL = (
    "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "conda: conda install -c conda-forge cxx-compiler) or set CXX to one"
)
# Seconds that one core needs for a whole part: the estimate that is shown before a build.
CORE_SECONDS = {"cpu": 150, "cuda": 2400, "search": 20}
ERROR_LINES = 15
LIBRARY = "library.so"
# Runs in a separate process. close_fds: ninja and the compilers inherit the caller's lock.
LOAD = """
import functools, json, subprocess, sys
from torch.utils import cpp_extension
subprocess.run = functools.partial(subprocess.run, close_fds=False)
cpp_extension.load(**json.loads(sys.argv[1]))
"""


class BuildInterrupted(KeyboardInterrupt):
    """Ctrl-C during a build. The message says what is kept."""


class Compiler(NamedTuple):
    """A C++ compiler: its command, and what ``--version`` says."""

    command: tuple[str, ...]
    version: str

    @property
    def key(self) -> str:
        """Compilers with different keys may compile the same source to different code."""
        return f"{self.version}{self.command[1:]}"


class CudaTarget(NamedTuple):
    """The toolkit and the devices that CUDA kernels are compiled with and for."""

    toolkit: cuda_build.Toolkit
    archs: tuple[str, ...]


def find_compiler() -> Compiler:
    """``CXX``, or the first of the usual compilers on PATH.

    Raises:
        RuntimeError: there is none, or it doesn't run; the message says what to do.
        ValueError: ``CXX`` is not a valid command.
    """
    wanted = env.cxx()
    if wanted:
        path = shutil.which(wanted[0])
        if path is None:
            raise RuntimeError(
                f"the C++ compiler {wanted[0]} in CXX was not found: {HOW_TO_INSTALL}"
            )
        command = (path, *wanted[1:])
    else:
        path = next(filter(None, map(shutil.which, COMPILERS)), None)
        if path is None:
            names = ", ".join(COMPILERS)
            raise RuntimeError(f"no C++ compiler was found ({names}): {HOW_TO_INSTALL}")
        command = (path,)
    return Compiler(command, _version(command))


@lru_cache(maxsize=4)  # called at every attention call until a library is built
def _version(command: tuple[str, ...]) -> str:
    try:
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the C++ compiler {shlex.join(command)} doesn't run: {error}") from None
    if told.returncode != 0:
        raise RuntimeError(
            f"the C++ compiler {shlex.join(command)} --version failed: {told.stderr.strip()}"
        )
    return told.stdout


def find_ninja() -> str:
    """Ninja from the Python package of that name, or from PATH.

    Raises:
        RuntimeError: there is none.
    """
    with contextlib.suppress(ImportError):
        from ninja import BIN_DIR

        if (Path(BIN_DIR) / "ninja").exists():
            return str(Path(BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("ninja was not found: pip install ninja")
    return found


def as_one_program(command: Sequence[str], folder: Path) -> str:
    """The path of one program that runs a compiler with its arguments: a script if necessary."""
    if len(command) == 1:
        return command[0]
    script = folder / "c++"
    _write_if_new(script, f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'.encode())
    script.chmod(0o700)
    return str(script)


def compile_library(
    part: str,
    compiler: Compiler,
    target: CudaTarget | None,
    files: Mapping[str, bytes],
    objects: Path,
    lock: IO,
) -> Path:
    """Compile and link the library of a part.

    Args:
        part: "cpu" or "cuda".
        compiler: for the C++ files and the linking.
        target: for the part "cuda".
        files: the sources' content by their path below ``csrc``.
        objects: the folder of build folders.
        lock: the file whose lock the caller holds. Every process of the build inherits it.

    Returns:
        The library in the build folder, where the next build replaces it.

    Raises:
        RuntimeError: the compiler failed; the message has its last lines.
        OSError: the folder can't be written.
    """
    folder = objects / f"{part}-{platform.machine()}-{_settings_key(part, compiler, target)}"
    root = folder / "csrc"
    again = (folder / ".ninja_log").exists()
    _copy_sources(files, root)
    (folder / "lock").unlink(missing_ok=True)  # torch's lock, left by a killed build
    (folder / LIBRARY).unlink(missing_ok=True)  # links again: ninja doesn't know the CUDA objects

    ninja = _Ninja(part, folder, compiler, lock)
    ninja.announce(objects.parent, again)
    units, flags, link_flags = cpu_sources(root), list(COMPILE_FLAGS), ["-shared"]
    if target:
        kernels = cuda_build.write_ninja(
            folder / "kernels", target.toolkit, root, target.archs, ptx=False
        )
        ninja.run([find_ninja(), "-v", "-j", str(env.max_jobs())], folder / "kernels")
        units = [*cuda_build.host_sources(root), *cuda_build.shared_checks(root)]
        flags += cuda_build.host_flags(target.toolkit, target.archs)
        link_flags += [
            *map(str, kernels), f"-L{target.toolkit.libraries}", *cuda_build.LINK_FLAGS,
        ]  # fmt: skip
    arguments = {
        "name": LIBRARY,
        "sources": [str(path) for path in _write_units(units, root, folder / "units")],
        "extra_cflags": flags,
        "extra_ldflags": link_flags,
        "build_directory": str(folder),
        "verbose": True,  # ninja then prints each file that it has compiled
        "with_cuda": False,
        # Not loaded in that process: it must first move to its place. "-shared" links a library.
        "is_python_module": False,
        "is_standalone": True,
    }
    if not sys.executable:
        raise RuntimeError("building needs a Python interpreter, and sys.executable names none")
    ninja.run([sys.executable, "-c", LOAD, json.dumps(arguments)], folder)
    return folder / LIBRARY


def compile_module(
    part: str, compiler: Compiler, files: Mapping[str, bytes], objects: Path, lock: IO
) -> Path:
    """Compile a Python module by pybind11; arguments, result and errors as ``compile_library``."""
    folder = objects / f"{part}-{platform.machine()}-{_settings_key(part, compiler, None)}"
    root = folder / "csrc"
    again = (folder / ".ninja_log").exists()
    _copy_sources(files, root)
    (folder / "lock").unlink(missing_ok=True)  # torch's lock, left by a killed build
    arguments = {
        "name": f"gqa_kernels_{part}",
        "sources": [str(root / name) for name in files if name.endswith(".cpp")],
        "extra_cflags": [flag for flag in COMPILE_FLAGS if not flag.startswith("-D")],
        "build_directory": str(folder),
        "verbose": True,
        "with_cuda": False,
    }
    ninja = _Ninja(part, folder, compiler, lock)
    ninja.announce(objects.parent, again)
    ninja.run([sys.executable, "-c", LOAD, json.dumps(arguments)], folder)
    return folder / f"gqa_kernels_{part}.so"


def _settings_key(part: str, compiler: Compiler, target: CudaTarget | None) -> str:
    """What the objects depend on besides the sources."""
    import torch

    settings = (part, compiler, target, COMPILE_FLAGS, torch.__file__, torch.__version__)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def _copy_sources(files: Mapping[str, bytes], root: Path) -> None:
    """Make a folder hold exactly these files. Files that are up to date keep their times."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.relative_to(root).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        _write_if_new(root / name, content)


def _write_units(sources: Sequence[Path], root: Path, folder: Path) -> list[Path]:
    units = []
    for source in sources:
        name = source.relative_to(root)
        units.append(folder / ".".join(name.parts))
        _write_if_new(units[-1], f'#include "../{root.name}/{name.as_posix()}"\n'.encode())
    return units


def _write_if_new(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(content)


class _Ninja:
    """Runs ninja, or a program that runs it, for one library, and reports progress on standard
    error."""

    def __init__(self, part: str, folder: Path, compiler: Compiler, lock: IO):
        self.part, self.lock, self.folder = part, lock, folder
        self.progress = BuildProgress()
        self.command = shlex.join(compiler.command)
        self.environment = {
            **os.environ,
            "CXX": as_one_program(compiler.command, folder),
            "PATH": f"{Path(find_ninja()).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # for the same torch
            "MAX_JOBS": str(env.max_jobs()),
            "NINJA_STATUS": "[%f/%t] ",
            # ninja skips what is up to date. Set CXX to use ccache as well.
            "TORCH_NO_COMPILER_WRAPPER": "1",
            # The stable ABI is C, so any compiler will do.
            "TORCH_DONT_CHECK_COMPILER_ABI": "1",
        }

    def announce(self, cache: Path, again: bool) -> None:
        if again:
            extent = "what has changed since the last build"
        else:
            self.progress.expected = CORE_SECONDS[self.part] / env.max_jobs()
            minutes = max(1, round(self.progress.expected / 60))
            extent = f"once, for about {minutes} min on {env.max_jobs()} free processors"
        say(f"compiling the {self.part.upper()} kernels, {extent}; kept in {cache}")

    def run(self, command: Sequence[str], folder: Path) -> None:
        """Run a command whose output has the form of ``ninja -v``.

        Raises:
            RuntimeError: the command failed; the message has the compiler's last lines.
                BuildInterrupted: the user pressed Ctrl-C.
        """
        try:
            said, status = self._follow(command, folder)
        except KeyboardInterrupt:
            self.progress.end()
            raise BuildInterrupted(
                f"what was compiled so far is kept in {self.folder}, and the next build continues"
            ) from None
        self.progress.end()
        if status != 0:
            raise RuntimeError(self._failure(said, status))

    def _follow(self, command: Sequence[str], folder: Path) -> tuple[list[str], int]:
        """Run the command and show its progress. Returns its other lines and its exit status."""
        said = []
        with subprocess.Popen(
            command, cwd=folder, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=[self.lock.fileno()],
        ) as process:  # fmt: skip
            assert process.stdout is not None  # Popen was called with a pipe
            for line in process.stdout:
                done = re.match(r"\[(\d+)/(\d+)\] .* -o (\S+)", line)
                if done:
                    self.progress.show(int(done[1]), int(done[2]), _described(done[3]))
                elif line.strip():
                    said.append(line.rstrip())
        return said, process.returncode

    def _failure(self, said: list[str], status: int) -> str:
        first = next((i for i, line in enumerate(said) if line.startswith("FAILED:")), None)
        if first is None:
            return "\n".join([f"building the {self.part.upper()} kernels failed:", *said[-15:]])
        code = re.search(r"code=(\d+)", said[first])
        lines = [line for line in said[first + 2 :] if not line.startswith("ninja:")]
        ends = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
        lines = lines[: ends[0]] if ends else lines
        words = "\n".join(lines[-ERROR_LINES:]) or "it printed nothing"
        return (
            f"building the {self.part.upper()} kernels failed: {self.command} exited with "
            f"{code[1] if code else status} for {_described(said[first].split()[-1])}:\n{words}"
        )


def _described(output: str) -> str:
    """``host.append.o`` as ``host/append``."""
    if output == LIBRARY:
        return "linked"
    return output.removesuffix(".o").replace(".", "/")
