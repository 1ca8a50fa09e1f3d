"""Counts instructions of inner loops in disassembled object files of x86-64 and aarch64."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
_JUMP = re.compile(r"^(j\w+|b|b\.\w+|cbn?z|tbn?z)$")
_TARGET = re.compile(r"\b([0-9a-f]+) <")
_X86_LANES = {"xmm": 4, "ymm": 8, "zmm": 16}
_X86 = {"vfmadd": 1, "vpmaddwd": 2, "vpdpwssd": 2, "vdpbf16ps": 2, "vpdpbusd": 4}
# For sdot and smmla, kernels split 16-bit numbers into bytes: two of their products count as one.
_ARM = {
    "fmla": 4, "fmlal": 4, "fmlal2": 4, "smlal": 4, "smlal2": 4, "bfdot": 8, "bfmmla": 16,
    "sdot": 8, "smmla": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    name: str
    operands: str

    @property
    def multiply_adds(self) -> int:
        """Products that the instruction adds to sums, over all lanes."""
        for start, per_lane in _X86.items():
            lanes = re.search("[xyz]mm", self.operands)
            if self.name.startswith(start) and lanes and not self.name.endswith(("ss", "sd")):
                return per_lane * _X86_LANES[lanes[0]]
        return _ARM.get(self.name, 0) if re.match(r"v\d+\.", self.operands) else 0

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        if not _JUMP.match(self.name):
            return None
        found = _TARGET.search(self.operands)
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """Instructions from a jump's target to the jump."""

    instructions: int
    multiply_adds: int

    @property
    def per_product(self) -> float:
        return self.instructions / self.multiply_adds


def functions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Names and instructions of the functions in what ``objdump -dC --no-show-raw-insn`` prints."""
    name, found = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            if found:
                yield name, found
            name, found = header[1], []
        elif match := _LINE.match(line):
            found.append(Instruction(int(match[1], 16), match[2], match[3]))
    if found:
        yield name, found


def main_loop(code: list[Instruction]) -> Loop | None:
    """The innermost loop with the most multiply-adds; the shortest of several: others do tails."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    loops = {
        (place[x.target], i)
        for i, x in enumerate(code)
        if x.target is not None and place.get(x.target, i) < i
    }
    inner = [
        (a, b) for a, b in loops
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    ]  # fmt: skip
    counted = [
        Loop(b - a + 1, sum(instruction.multiply_adds for instruction in code[a : b + 1]))
        for a, b in inner
    ]
    counted = [loop for loop in counted if loop.multiply_adds]
    return max(counted, key=lambda loop: (loop.multiply_adds, -loop.instructions), default=None)


def main_loops(library: Path, objdump: str) -> dict[str, Loop]:
    """By function, the main loops of an object file."""
    command = [objdump, "-dC", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: main_loop(code) for name, code in functions(text)}
    return {name: loop for name, loop in found.items() if loop is not None}
