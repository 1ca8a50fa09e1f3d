"""Instructions of the CPU kernels' decode loops, by instruction set, beside each other.

    python -m tools.vector_loops                      compile csrc/cpu/isa for x86-64 and aarch64
    python -m tools.vector_loops --x86 X.o --arm Y.o  count in object files of forward_avx2.cpp and
                                                      forward_neon.cpp
    python -m tools.vector_loops --write              also write the table of csrc/README.md

Speed needs the processor; this needs a cross compiler only. For each product (q . k and p . v) it
takes the innermost loop with the most multiply-adds. The table has a loop's instructions per
(row, key, dim), and of both products together per key at a head dim of 128. The softmax between the
products is not counted.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .count import Loop, main_loops

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES, README = CSRC / "cpu" / "isa", CSRC / "README.md"
BEGIN, END = "<!-- vector loops: begin -->", "<!-- vector loops: end -->"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off")
SETS = {  # instruction set: compiler, disassembler
    "avx2": ("g++", "objdump"),
    "neon": ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"),
}
TYPES = {"fp32": "float", "bf16": "BFloat16", "fp16": "Float16", "int8": "Int8", "int4": "Int4Pair"}
ROWS = (1, 2, 4, 6)
HEAD_DIM = 128


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.vector_loops", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--x86", type=Path, help="object file of forward_avx2.cpp")
    parser.add_argument("--arm", type=Path, help="object file of forward_neon.cpp")
    parser.add_argument("--write", action="store_true", help="write the table of csrc/README.md")
    arguments = parser.parse_args(argv)
    loops = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa, given in (("avx2", arguments.x86), ("neon", arguments.arm)):
            compiler, objdump = SETS[isa]
            try:
                loops[isa] = main_loops(given or compiled(isa, compiler, Path(folder)), objdump)
            except FileNotFoundError as error:
                print(f"tools.vector_loops: {error.filename} is not installed", file=sys.stderr)
                return 2
    print(table(loops))
    if arguments.write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table(loops)}\n{END}{rest.split(END)[1]}")
    return 0


def compiled(isa: str, compiler: str, folder: Path) -> Path:
    """The object file of an instruction set's forward kernels. Takes a minute or two."""
    result = folder / f"{isa}.o"
    source = SOURCES / f"forward_{isa}.cpp"
    subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", str(result)], check=True)
    return result


def table(loops: dict[str, dict[str, Loop]]) -> str:
    """Markdown. A set with products of integers uses them for int8 and int4."""
    head = ["type", "rows"]
    for isa in loops:
        head += [f"{isa}: q . k", "p . v", "per key"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, stored in TYPES.items():
        for rows in ROWS:
            cells = [name, str(rows)]
            for isa in loops:
                products = [find(loops[isa], stored, f"{f}_rows<{rows}>") for f in ("dot", "add")]
                each = [loop.per_product for loop in products]
                cells += [f"{x:.2f}" for x in each] + [f"{sum(each) * rows * HEAD_DIM:.0f}"]
            lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def find(loops: dict[str, Loop], stored: str, function: str) -> Loop:
    """The loop of a function of the products over stored numbers of a type."""
    for products in ("Int16Products", "DirectProducts"):
        pattern = rf"\b{products}<[^<>]*Vec, (gqa::)?{stored}>::{re.escape(function)}"
        for name, loop in loops.items():
            if re.search(pattern, name):
                return loop
    raise ValueError(f"no loop of {function} over {stored} was found")


if __name__ == "__main__":
    sys.exit(main())
