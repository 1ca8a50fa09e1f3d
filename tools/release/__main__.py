"""Build what is released.

::

    pip install '.[release]'
    python -m tools.release dist                          # sdist and both Linux wheels for CPUs
    python -m tools.release dist --platform macos-arm64   # on a Mac
    python -m tools.release dist --platform linux-x86_64 --cuda   # with nvcc: CUDA kernels, too

Each writes the source distribution, a wheel without a library (any platform; it compiles at first
use), a wheel for each platform, and over everything in the folder an SBOM (CycloneDX) and
``SHA256SUMS``. A wheel for a platform serves every Python from 3.10 and every torch from 2.10 on:
its library uses nothing of Python, and of torch only the stable ABI. Linux wheels are checked by
auditwheel. The compilers are Debian's g++ and g++-aarch64-linux-gnu, on a Mac Xcode's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import sbom
from .library import build_library
from .platforms import PLATFORMS
from .wheels import build_cuda, build_sources, pack_wheel

CHECKOUT = Path(__file__).parents[2]
CPU_WHEELS = ("linux-x86_64", "linux-aarch64")
SUMS = "SHA256SUMS"


def build(platforms: Sequence[str], cuda: bool, out: Path, scratch: Path) -> list[Path]:
    """Write everything into a folder.

    Args:
        platforms: names in ``PLATFORMS``.
        cuda: build the wheel with CUDA kernels, for one platform.
        out: what lies there already is described by the SBOM and the checksums as well.
        scratch: folder of the builds; a second run compiles only what has changed.

    Returns:
        The files of the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    _, pure = build_sources(CHECKOUT, out)
    for name in platforms:
        if cuda:
            build_cuda(CHECKOUT, PLATFORMS[name], out, scratch / name)
            continue
        library = build_library(PLATFORMS[name], CHECKOUT / "csrc", scratch / name / "objects")
        pack_wheel(pure, library, PLATFORMS[name], out, scratch / name)
    describe(out)
    return sorted(out.iterdir())


def describe(out: Path) -> None:
    """Write the SBOM of a folder's distributions, and the checksums of all of its files."""
    files = sorted([*out.glob("*.whl"), *out.glob("*.tar.gz")])
    wheel = next(path for path in files if path.name.endswith("-none-any.whl"))
    about = sbom.metadata(wheel)
    bill = out / f"{about['Name'].replace('-', '_')}-{about['Version']}.cdx.json"
    bill.write_text(sbom.make_sbom(wheel, files))
    (out / SUMS).write_text(sbom.checksums([*files, bill]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--platform", action="append", choices=PLATFORMS, help=f"({', '.join(CPU_WHEELS)})"
    )
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels; for one platform")
    parser.add_argument(
        "--describe", action="store_true", help="build nothing: write SBOM and checksums again"
    )
    parser.add_argument("--scratch", type=Path, help="folder to keep objects in (a temporary one)")
    arguments = parser.parse_args(argv)
    if arguments.describe:
        describe(arguments.out)
        return 0
    platforms = arguments.platform or CPU_WHEELS
    if arguments.cuda and len(platforms) != 1:
        parser.error("--cuda needs one --platform")
    # Archives with the commit's time: the same commit makes the same files.
    git = ["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    if commit:
        os.environ.setdefault("SOURCE_DATE_EPOCH", commit)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).absolute()
        try:
            files = build(platforms, arguments.cuda, arguments.out.absolute(), scratch)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"tools.release: {error}", file=sys.stderr)
            return 1
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
