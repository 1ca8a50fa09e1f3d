"""Instructions of the CPU kernels' decode loops, by instruction set, beside each other.

    python -m tools.vector_loops                      compile csrc/cpu/isa for x86-64 and aarch64
    python -m tools.vector_loops --objects FOLDER     keep the object files there, and take those
                                                      that are there already
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
X86 = ("g++", "objdump")  # compiler, disassembler
ARM = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump")
SETS = {
    "avx2": X86, "avx512_bf16": X86, "neon": ARM, "neon_dot": ARM, "neon_fhm": ARM,
    "neon_bf16": ARM,
}  # fmt: skip
NEWER = {  # by type, the sets with instructions of later processors
    "bf16": ("avx512_bf16", "neon_bf16"), "fp16": ("neon_fhm",), "int8": ("neon_dot", "neon_bf16"),
    "int4": ("neon_dot", "neon_bf16"),
}  # fmt: skip
TYPES = {"fp32": "float", "bf16": "BFloat16", "fp16": "Float16", "int8": "Int8", "int4": "Int4Pair"}
ROWS = (1, 2, 4, 6)
HEAD_DIM = 128


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.vector_loops", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--objects", type=Path, help="folder of the object files")
    parser.add_argument("--write", action="store_true", help="write the table of csrc/README.md")
    arguments = parser.parse_args(argv)
    loops = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa, (compiler, objdump) in SETS.items():
            try:
                objects = compiled(isa, compiler, arguments.objects or Path(folder))
                loops[isa] = main_loops(objects, objdump)
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
    if result.exists():
        return result
    source = SOURCES / f"forward_{isa}.cpp"
    subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", str(result)], check=True)
    return result


def table(loops: dict[str, dict[str, Loop]]) -> str:
    """Markdown. A set with products of integers uses them for int8 and int4."""
    head = ["type", "rows"]
    for isa in ("avx2", "neon"):
        head += [f"{isa}: q . k", "p . v", "per key"]
    head += ["newer set", "q . k", "p . v", "per key"]
    lines = [head, ["---", "---:", *["---:"] * 6, "---", *["---:"] * 3]]
    for name, stored in TYPES.items():
        for newer in NEWER.get(name, ("",)):
            for rows in ROWS:
                cells = [name, str(rows)]
                for isa in ("avx2", "neon"):
                    cells += counts(loops[isa], stored, rows)
                cells += [newer, *(counts(loops[newer], stored, rows) if newer else [""] * 3)]
                lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts(loops: dict[str, Loop], stored: str, rows: int) -> list[str]:
    """Instructions per (row, key, dim) of both products, and per key of both together."""
    each = [find(loops, stored, f"{f}_rows<{rows}>").per_product for f in ("dot", "add")]
    return [*(f"{x:.2f}" for x in each), f"{sum(each) * rows * HEAD_DIM:.0f}"]


def find(loops: dict[str, Loop], stored: str, function: str) -> Loop:
    """The loop of a function of the products over stored numbers of a type."""
    for products in ("HalfProducts", "Int16Products", "DirectProducts"):
        pattern = rf"\b{products}<[^<>]*Vec, (gqa::)?{stored}>::{re.escape(function)}"
        for name, loop in loops.items():
            if re.search(pattern, name):
                return loop
    raise ValueError(f"no loop of {function} over {stored} was found")


if __name__ == "__main__":
    sys.exit(main())
