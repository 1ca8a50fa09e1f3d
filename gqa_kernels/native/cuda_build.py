"""How the CUDA kernels are built: the toolkit, architectures, sources and commands.

``setup.py`` imports this file without the package: it imports neither the package nor torch.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from . import ninja_file
from .sources import find_text, is_cuda

# The devices of a wheel: A100 and its family, H100, B200, RTX 50. Kernels under csrc/cuda/sm90 use
# instructions of 90a. The others run on 80 and later, and the wheel has their PTX for devices that
# are not in this list. The driver then compiles each .cu file at its first call, in 10 to 30
# seconds.
DEFAULT_ARCHS = ("80", "90a", "100", "120")
# ptxas prints registers and spills; tests/emulation/cuda_resources.py reads them from the log.
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")

SHARED_CHECKS = ("inputs", "append_inputs", "keep_inputs", "gradients")


class Toolkit(NamedTuple):
    """An installed CUDA toolkit: its folder, and what ``nvcc --version`` says."""

    root: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def libraries(self) -> Path:
        lib64 = self.root / "lib64"
        return lib64 if lib64.is_dir() else self.root / "lib"


def _pip_toolkit() -> Path | None:
    """The folder in which pip installs ``nvidia-cuda-nvcc`` and ``nvidia-cuda-runtime``."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        found = sorted(
            path for path in Path(folder).glob("cu[0-9]*") if (path / "bin/nvcc").exists()
        )
        if found:
            return found[-1]
    return None


def _root_on_path() -> Path | None:
    """The folder of the toolkit whose nvcc is on PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc may be a wrapper script in another folder. It prints where the toolkit is.
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-"], capture_output=True, text=True, timeout=60
    )
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.M)
    return Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent


@lru_cache
def find_toolkit(cuda_home: str | None) -> Toolkit | None:
    """The toolkit at ``cuda_home``; for None, that of the nvcc on PATH, or of pip's packages."""
    root = Path(cuda_home) if cuda_home is not None else _root_on_path() or _pip_toolkit()
    if root is None:
        return None
    nvcc = root / "bin" / "nvcc"
    if not nvcc.exists() or not (root / "include" / "cuda_runtime_api.h").exists():
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    return Toolkit(root.resolve(), told.stdout.strip()) if told.returncode == 0 else None


def version_digits(toolkit: Toolkit) -> str:
    """A toolkit's release in the form that wheels use in local versions: ``130`` for CUDA 13.0.

    Raises:
        ValueError: nvcc prints no release.
    """
    found = re.search(r"release (\d+)\.(\d+)", toolkit.version)
    if found is None:
        raise ValueError(f"nvcc --version must name a release, got {toolkit.version!r}")
    return found[1] + found[2]


def parse_archs(arch_list: str) -> tuple[str, ...]:
    """Converts ``"8.0;9.0+PTX"``, the form of ``TORCH_CUDA_ARCH_LIST``, to ``("80", "90a")``.

    Raises:
        ValueError: an entry is not a compute capability of 8.0 or more.
    """
    archs = []
    for entry in re.split(r"[;\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if match is None or int(match[1]) < 8:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must list compute capabilities of 8.0 or more, got {entry!r}"
            )
        archs.append(arch_of((int(match[1]), int(match[2]))))
    return tuple(dict.fromkeys(archs))


def arch_of(capability: tuple[int, int]) -> str:
    """``(9, 0)`` as ``"90a"``, ``(8, 6)`` as ``"86"``."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if major == 9 else "")


def kernel_sources(root: Path, archs: Sequence[str]) -> list[Path]:
    """The .cu files to compile for these architectures."""
    sources = sorted((root / "cuda").rglob("*.cu"))
    return [path for path in sources if gencode_flags(root, path, archs, ptx=False)]


def host_sources(root: Path) -> list[Path]:
    """The C++ files that are only in a library with CUDA kernels."""
    units = sorted(root.rglob("*.cpp"))
    return [path for path in units if is_cuda(root, path)]


def shared_checks(root: Path) -> list[Path]:
    """The C++ files of checks, which a library with only the CUDA kernels needs, too.

    Then both libraries contain the checks of host code, hidden from each other.
    """
    return [root / "host" / f"{name}.cpp" for name in SHARED_CHECKS]


def host_flags(toolkit: Toolkit, archs: Sequence[str]) -> list[str]:
    """Compiler flags of those files, besides the flags of all C++ files."""
    flags = ["-isystem", str(toolkit.include), f"-DGQA_CUDA_ARCHS={'_'.join(archs)}"]
    return [*flags, "-DGQA_CUDA_SM90"] if "90a" in archs else flags


def gencode_flags(root: Path, source: Path, archs: Sequence[str], ptx: bool) -> list[str]:
    """The devices to compile a .cu file for, as flags; empty if none. ``ptx``: add PTX for later
    ones."""
    hopper_only = source.is_relative_to(root / "cuda" / "sm90")
    flags = []
    for arch in archs:
        if not hopper_only or arch == "90a":
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if ptx and not hopper_only and "80" in archs:
        flags += ["-gencode", "arch=compute_80,code=compute_80"]
    return flags


def compile_command(
    toolkit: Toolkit, root: Path, source: Path, target: Path, archs: Sequence[str], ptx: bool
) -> list[str]:
    """The command that compiles a .cu file to an object."""
    gencode = gencode_flags(root, source, archs, ptx)
    return [str(toolkit.nvcc), *NVCC_FLAGS, *gencode, "-c", str(source), "-o", str(target)]


def write_ninja(
    folder: Path, toolkit: Toolkit, root: Path, archs: Sequence[str], ptx: bool
) -> list[Path]:
    """Write ``folder/build.ninja``, which compiles the kernels.

    Torch's own build has one list of devices for all .cu files of a library. It accepts the
    compiler of torch's own CUDA version only, and none if torch is a CPU build.

    Returns:
        The objects that ninja will make.
    """

    def command(source: Path, target: Path) -> list[str]:
        return compile_command(toolkit, root, source, target, archs, ptx)

    return ninja_file.write_ninja(folder, root, kernel_sources(root, archs), command)


def build_info(library: Path) -> str | None:
    """The build of the CUDA kernels in a library, in the form ``"CUDA 13.0: sm_80, sm_90a"``.

    None if it has no CUDA kernels. This reads the text of ``csrc/bindings_cuda.cpp`` from the file.
    """
    found = find_text(library, rb"gqa_kernels CUDA build (\d+) ([0-9a-z_]+)\0")
    if found is None:
        return None
    version, archs = int(found[0]), found[1].decode().split("_")
    names = ", ".join(f"sm_{arch}" for arch in archs)
    return f"CUDA {version // 1000}.{version % 1000 // 10}: {names}"
