"""What the CUDA kernels take, by ptxas: ``python -m tests.emulation.cuda_resources``

Registers, spills and shared memory. Reads what ptxas says (``-Xptxas -v``) from ``--log FILE``, the
output of a verbose build of the wheel, or compiles every .cu file itself for sm_80 and sm_90a,
which takes minutes. Prints the table; ``--write`` puts it into csrc/README.md, ``--check`` exits
with 1 where that has another one. Exits with 1 where a kernel of the main configurations spills, or
ptxas serialises wgmma.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gqa_kernels.native import cuda_build, env

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
README = CSRC / "README.md"
BEGIN, END = "<!-- CUDA resources: begin {} -->", "<!-- CUDA resources: end -->"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
TABLE_ARCHS = ("80", "90a")  # of the four that a wheel has: the others run the kernels of sm_80
TYPES = {"gqa::BFloat16": "bf16", "gqa::Float16": "fp16"}


class Kernel(NamedTuple):
    arch: str
    name: str  # demangled, without namespaces and arguments
    registers: int
    spills: int  # bytes stored and loaded
    static_shared: int

    @property
    def template(self) -> str:
        return re.match(r"\w+", self.name)[0]

    @property
    def arguments(self) -> list[str]:
        """Template arguments; a configuration's own are part of its name."""
        return re.findall(r"(?:[^,<>]|<[^<>]*>)+", self.name[len(self.template) + 1 : -1])

    @property
    def config(self) -> str | None:
        """The C++ class with its shapes, if it has one."""
        return next((x for x in map(str.strip, self.arguments) if "Config<" in x), None)

    @property
    def head_dim_class(self) -> int | None:
        return int(re.search(r"<(\d+)", self.config)[1]) if self.config else None

    @property
    def must_not_spill(self) -> bool:
        return self.head_dim_class in (64, 128)


def parse(log: str) -> list[Kernel]:
    """The kernels that a log of ptxas tells of."""
    found: dict[tuple[str, str], list[int]] = {}
    current = None
    for line in log.splitlines():
        if match := ENTRY.search(line):
            current = found.setdefault((match[2], match[1]), [0, 0, 0])
        elif current and (match := SPILLS.search(line)):
            current[1] = int(match[1]) + int(match[2])
        elif current and (match := USED.search(line)):
            current[0], current[2] = int(match[1]), int(match[2] or 0)
    mangled = [name for _, name in found]
    told = subprocess.run(
        ["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = [
        re.sub(r"\((?!anonymous)[\w:]*\)", "", name.split("(gqa::cuda", 1)[0])  # casts of enums
        for name in told.stdout.splitlines()
    ]
    namespaces = r"^(void )?((\w+|\(anonymous namespace\))::)*(?=\w+<|\w+$)"
    names = [re.sub(namespaces, "", name) for name in names]
    kernels = [
        Kernel(arch, name, registers, spills, static)
        for ((arch, _), (registers, spills, static)), name in zip(
            found.items(), names, strict=True
        )
    ]  # fmt: skip
    return sorted(set(kernels))


def compile_log() -> str:
    """What ptxas says of every .cu file."""
    toolkit = cuda_build.find_toolkit(env.cuda_home())
    archs = TABLE_ARCHS
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            command = cuda_build.compile_command(
                toolkit, CSRC, source, Path(folder) / f"{abs(hash(source))}.o", archs, ptx=False
            )
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stderr

        with ThreadPoolExecutor(2) as pool:
            return "".join(pool.map(compiled, cuda_build.kernel_sources(CSRC, archs)))


def dynamic_shared(kernels: list[Kernel]) -> dict[str, int]:
    """Bytes per configuration class, asked of the C++ constants themselves."""
    configs = sorted({kernel.config for kernel in kernels} - {None})
    headers = sorted((CSRC / "cuda").rglob("config.h"))
    lines = [f'#include "{header}"' for header in headers]
    lines += ["#include <cstdio>", "int main() {"]
    lines += [f'  std::printf("%d\\n", static_cast<int>({c}::kSharedBytes));' for c in configs]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "sizes"
        source = program.with_suffix(".cu")  # headers may have device functions
        source.write_text("\n".join([*lines, "}\n"]))
        nvcc = cuda_build.find_toolkit(env.cuda_home()).nvcc
        subprocess.run([nvcc, "-std=c++17", "-arch=sm_80", source, "-o", program], check=True)
        told = subprocess.run([program], capture_output=True, text=True, check=True)
    return dict(zip(configs, map(int, told.stdout.split()), strict=True))


def table(kernels: list[Kernel]) -> str:
    """A Markdown table: kernels that differ in type or variant only share a row."""
    shared = dynamic_shared(kernels)
    rows: dict[tuple, list[Kernel]] = {}
    for kernel in kernels:
        key = (kernel.arch, kernel.template, kernel.head_dim_class or 0, kernel.config or "")
        rows.setdefault(key, []).append(kernel)
    lines = [
        "| built for | kernel | class | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|---|",
    ]
    for (arch, template, _, config), group in sorted(rows.items()):
        registers = sorted({kernel.registers for kernel in group})
        spills = max(kernel.spills for kernel in group)
        static = max(kernel.static_shared for kernel in group)
        span = f"{registers[0]}" if len(registers) == 1 else f"{registers[0]}-{registers[-1]}"
        size = shared[config] + static if config else static
        name = config.rsplit("::", 1)[-1] if config else ""
        lines.append(f"| {arch} | `{template}` | {name} | {span} | {spills} | {size:,} |")
    return "\n".join(lines)


def source_key() -> str:
    """Hash of what the kernels are compiled from; the table names it, so that it can't go stale."""
    digest = hashlib.sha256(repr(cuda_build.NVCC_FLAGS).encode())
    for folder in ("core", "cuda"):
        for path in sorted((CSRC / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu"):
                digest.update(f"{path.relative_to(CSRC)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def written() -> tuple[str, str]:
    """The key and the table in the README."""
    pattern = BEGIN.format(r"(\w+)") + r"\n(.*?)\n" + END
    found = re.search(pattern, README.read_text(), re.S)
    assert found, f"{README} lacks the markers {BEGIN} and {END}"
    return found[1], found[2]


def write(text: str) -> None:
    key, old = written()
    begin = BEGIN.format("{}") + "\n"
    readme = README.read_text()
    before, after = begin.format(key) + old, begin.format(source_key()) + text
    README.write_text(readme.replace(before, after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="of a verbose build")
    parser.add_argument("--write", action="store_true", help="into csrc/README.md")
    parser.add_argument("--check", action="store_true", help="csrc/README.md has this table")
    arguments = parser.parse_args()
    log = arguments.log.read_text() if arguments.log else compile_log()
    kernels = [x for x in parse(log) if x.arch.removeprefix("sm_") in TABLE_ARCHS]
    if not kernels:
        sys.exit("the log tells of no kernels")
    text = table(kernels)
    print(text)
    if arguments.write:
        write(text)
    problems = [
        f"{kernel.name} for {kernel.arch} spills {kernel.spills} bytes"
        for kernel in kernels
        if kernel.must_not_spill and kernel.spills
    ]
    problems += re.findall(r".*wgmma.*serialized.*", log)
    if arguments.check and written()[1] != text:
        problems.append("csrc/README.md has another table (cuda_resources --write)")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
