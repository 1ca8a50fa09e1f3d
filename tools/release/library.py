"""Compiles the CPU library for a platform, which may be another one than this machine's.

Only torch's headers are needed. Our library is linked with an empty one that has torch's name.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gqa_kernels.native import compiler, env, manylinux, ninja_file
from gqa_kernels.native.sources import COMPILE_FLAGS, LIBRARY, cpu_sources

from .platforms import Platform

# Functions of torch's stable ABI, which is C.
STABLE_ABI = ("aoti_torch_", "torch_")


def build_library(platform: Platform, root: Path, folder: Path) -> Path:
    """Compile and link.

    Args:
        platform: to build for.
        root: of the sources, ``csrc``.
        folder: for the objects; what is in it already is not compiled again.

    Raises:
        RuntimeError: the library needs a function that the platform or an older torch may lack.
        subprocess.CalledProcessError: the compiler or the linker failed, and said why.
    """
    from torch.utils.cpp_extension import include_paths

    command = shlex.split(platform.compiler)
    flags = [*COMPILE_FLAGS, "-g0", *platform.compile_flags]
    includes = [word for path in include_paths() for word in ("-isystem", path)]

    def compile_one(source: Path, target: Path) -> list[str]:
        return [*command, *flags, *includes, "-c", str(source), "-o", str(target)]

    objects = ninja_file.write_ninja(folder, root, cpu_sources(root), compile_one)
    _run([compiler.find_ninja(), "-j", str(env.max_jobs())], folder)
    if platform.manylinux:
        objects.append(folder / "newer.o")
        _run(compile_one(manylinux.SOURCE, objects[-1]), folder)
    torch = folder / platform.torch
    empty = folder / "empty.cpp"
    empty.touch()
    _run([*command, "-shared", platform.torch_name, str(empty), "-o", str(torch)], folder)
    library = folder / LIBRARY
    link = [*command, "-shared", *platform.link_flags, *map(str, objects), str(torch)]
    _run([*link, "-o", str(library)], folder)
    if platform.manylinux:
        check_symbols(library)
    return library


def check_symbols(library: Path) -> None:
    """Refuse a library that uses more of torch than its stable ABI, or exports foreign symbols.

    libtorch also exports functions without a version, some of a newer libstdc++ among them. They
    could satisfy a missing function by accident. ``auditwheel`` checks versioned functions only.

    Raises:
        RuntimeError: naming the functions.
    """
    from elftools.elf.elffile import ELFFile

    with open(library, "rb") as file:
        elf = ELFFile(file)
        symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
        versions = elf.get_section_by_name(".gnu.version")
        numbers = [versions.get_symbol(i)["ndx"] for i in range(len(symbols))]
    named = [(s, n) for s, n in zip(symbols, numbers, strict=True) if s.name]
    missing = [(s, n) for s, n in named if s["st_shndx"] == "SHN_UNDEF"]
    wrong = [
        s.name
        for s, number in missing
        if not isinstance(number, int)  # "VER_NDX_GLOBAL": no version
        and s["st_info"]["bind"] != "STB_WEAK"
        and not s.name.startswith(STABLE_ABI)
    ]
    if wrong:
        raise RuntimeError(f"{library.name} needs functions of no known version: {wrong}")
    visible = [s.name for s, _ in named if s["st_shndx"] != "SHN_UNDEF"]
    wrong = [name for name in visible if not name.startswith("gqa_kernels")]
    if wrong:
        raise RuntimeError(f"{library.name} must export its own functions only, got {wrong}")


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True)
