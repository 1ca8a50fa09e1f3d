"""Machine code as text: cubins out of libraries, and the instructions of each kernel.

Needs ``cuobjdump`` and ``nvdisasm``. Both come with a CUDA toolkit, with Triton, or from pip as
``nvidia-cuda-cuobjdump`` and ``nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

SECTION = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
TEXT_SECTION = re.compile(rb"\0\.text\.(_Z[\w.$]+)")
LABEL = re.compile(r"^(\.L\S+):")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
GUARD = re.compile(r"^@!?U?P\w+\s+")


class Instruction(NamedTuple):
    """One machine instruction: its byte offset in the kernel and its text."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        """``"HMMA.16816.F32"`` of ``"@P0 HMMA.16816.F32 R4, ..."``."""
        return GUARD.sub("", self.text).split()[0]

    @property
    def operation(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


class Kernel(NamedTuple):
    """A kernel's instructions, and the index of the instruction behind each label."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: on PATH, under $CUDA_HOME, or installed by pip, with
    Triton too."""
    home = os.environ.get("CUDA_HOME")
    candidates = [shutil.which(name), *([f"{home}/bin/{name}"] if home else [])]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        candidates += map(str, sorted(Path(folder).glob(f"cu[0-9]*/bin/{name}"), reverse=True))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin" / name))
    return next((path for path in candidates if path and os.path.exists(path)), None)


def unavailable_reason() -> str | None:
    """Why nothing can be disassembled here, or None."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    if not missing:
        return None
    packages = " ".join(f"nvidia-cuda-{name}" for name in missing)
    return f"{' and '.join(missing)} not found: pip install {packages}"


def extract_cubins(library: Path, folder: Path, arch: str) -> list[Path]:
    """Write the cubins that a library or object file holds for ``arch`` (``"sm_90a"``)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [tool("cuobjdump"), "-xelf", f"{arch}.cubin", str(library.resolve())],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return sorted(folder.glob("*.cubin"))


def kernel_names(cubin: Path) -> list[str]:
    """Symbols of a cubin's kernels, read from its section names without disassembling it."""
    return sorted({name.decode() for name in TEXT_SECTION.findall(cubin.read_bytes())})


def disassemble(cubin: Path) -> list[Kernel]:
    """Every kernel of a cubin."""
    done = subprocess.run(
        [tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    return parse(done.stdout)


def parse(listing: str) -> list[Kernel]:
    """The kernels of a listing that ``nvdisasm -c`` printed."""
    kernels: list[Kernel] = []
    kernel = None
    for line in listing.splitlines():
        if match := SECTION.match(line):
            kernel = Kernel(match[1], [], {})
            kernels.append(kernel)
        elif kernel is None:
            continue
        elif re.match(r"\s*\.section\s", line):
            kernel = None
        elif match := LABEL.match(line):
            kernel.labels[match[1]] = len(kernel.instructions)
        elif match := INSTRUCTION.match(line):
            kernel.instructions.append(Instruction(int(match[1], 16), match[2].strip()))
    return kernels


def demangle(names: list[str]) -> list[str]:
    """C++ names of symbols, in order."""
    told = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return told.stdout.splitlines()
