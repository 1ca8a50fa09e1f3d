"""Main loops of our CUDA kernels beside FlashAttention's, counted in the machine code.

python -m tools.sass LIBRARY            print the table (LIBRARY: a built _C.abi3.so)
python -m tools.sass LIBRARY --check    fail if a loop grew by more than 5 %
python -m tools.sass LIBRARY --write    save main_loops.json and the table of csrc/README.md
python -m tools.sass LIBRARY --write --peers    measure the peers too (pip downloads their wheels)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from . import disassemble, model
from .disassemble import Kernel
from .loops import Loop, main_loops, walk_through
from .rows import ROWS, Part, Peer, Row

SAVED = Path(__file__).with_name("main_loops.json")
README = Path(__file__).parents[2] / "csrc" / "README.md"
BEGIN, END = "<!-- main loops: begin -->", "<!-- main loops: end -->"
ALLOWED_GROWTH = 1.05


def counts_of(library: Path, arch: str, parts: Iterable[Part]) -> dict[Part, list[int]]:
    """A warp's instructions in the main loops of the kernels that each part matches."""
    found: dict[Part, list[int]] = {part: [] for part in parts}
    with tempfile.TemporaryDirectory() as folder:
        for cubin in disassemble.extract_cubins(library, Path(folder), arch):
            symbols = disassemble.kernel_names(cubin)
            names = dict(zip(symbols, disassemble.demangle(symbols), strict=True))
            wanted = {
                symbol: [part for part in found if re.search(part.pattern, name)]
                for symbol, name in names.items()
            }
            if not any(wanted.values()):
                continue
            for kernel in disassemble.disassemble(cubin):
                for part in wanted.get(kernel.name, ()):
                    found[part] += [instructions(kernel, x, part) for x in main_loops(kernel)]
    return found


def instructions(kernel: Kernel, loop: Loop, part: Part) -> int:
    """Of a warp in one step, by the way around the loop that the part describes."""
    if part.through is None:
        return len(loop.path)
    walk = walk_through(kernel, loop.address, re.compile(part.through), part.inner > 0)
    return len(walk.instructions) + (part.inner - 1) * walk.inner


def warp_instructions(parts: tuple[Part, ...], counts: dict[Part, list[int]]) -> int | None:
    """Instructions of all warps for one step: the smallest matching loop of each part."""
    if not all(counts[part] for part in parts):
        return None
    return sum(part.warps * min(counts[part]) for part in parts)


def count(rows: Iterable[Row], libraries: dict[str, Path], side: str) -> dict[str, int | None]:
    """Warp instructions of one step, by row; ``libraries`` by architecture or by package."""
    counted = {}
    for key, library in libraries.items():
        mine = [row for row in rows if key in (row.arch if side == "ours" else row.peer.package,)]
        if not mine:
            continue
        arch = key if side == "ours" else mine[0].peer.arch
        parts = {part for row in mine for part in getattr(row, side)}
        counts = counts_of(library, arch, parts)
        for row in mine:
            counted[f"{row.arch} {row.name}"] = warp_instructions(getattr(row, side), counts)
    return counted


def download(peer: Peer, folder: Path) -> Path:
    """The compiled library inside the newest wheel of a package."""
    target = folder / peer.package
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
         "-d", str(target), peer.package],
        check=True,
    )  # fmt: skip
    wheel = next(target.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        return Path(archive.extract(largest, target))


def table(ours: dict[str, int | None], theirs: dict[str, int | None]) -> str:
    """The Markdown table."""
    lines = [
        "| kernel | tile | ours | peer | ours / peer | ours, predicted | peer, predicted |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        key = f"{row.arch} {row.name}"
        mine, peer = ours.get(key), theirs.get(key)
        ratio = f"{mine / peer:.2f}" if mine and peer else "?"
        name = "FA2" if "flash-attn-jax" in row.peer.package else "FA3"
        lines.append(
            f"| {row.name} ({row.arch}) | {row.step} | {mine or '?'} | {name} {peer or '?'} | "
            f"{ratio} | {predicted(row, 0, mine)} | {predicted(row, 1, peer)} |"
        )
    return "\n".join(lines)


def predicted(row: Row, side: int, counted: int | None) -> str:
    """Speed of ours (side 0) or the peer's on an H100: TFLOP/s, of decode TB/s."""
    if counted is None:
        return "?"
    m, n, k = row.tile
    flop = 2.0 * m * n * k
    executed = row.products[1 + side] * flop
    if row.bits is not None:
        read = 2 * n * k * row.bits[side] / 8  # K and V
        return f"{model.terabytes(read, executed, counted):.1f} TB/s"
    return f"{model.tflops(row.products[0] * flop, executed, counted, row.wgmma[side]):.0f}"


def grown(now: dict[str, int | None], before: dict[str, int | None]) -> list[str]:
    """What is wrong with the counts of now: a loop that grew, or that is no longer found."""
    problems = []
    for name, old in before.items():
        new = now.get(name)
        if new is None:
            problems.append(f"{name}: its main loop was not found")
        elif old is not None and new > ALLOWED_GROWTH * old:
            problems.append(f"{name}: {old} warp instructions a step before, {new} now")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sass",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args(arguments)
    reason = disassemble.unavailable_reason()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else {"ours": {}, "peers": {}}
    ours = count(ROWS, {row.arch: options.library for row in ROWS}, "ours")
    theirs = saved["peers"]
    if options.peers:
        with tempfile.TemporaryDirectory() as folder:
            peers = {row.peer.package: row.peer for row in ROWS}
            libraries = {name: download(peer, Path(folder)) for name, peer in peers.items()}
            theirs = count(ROWS, libraries, "theirs")
    if options.write:
        SAVED.write_text(json.dumps({"ours": ours, "peers": theirs}, indent=1) + "\n")
        text = README.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{table(ours, theirs)}\n{END}{after}")
    print(table(ours, theirs))
    problems = grown(ours, saved["ours"]) if options.check else []
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
