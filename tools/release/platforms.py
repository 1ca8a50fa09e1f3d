"""The platforms that have a wheel of their own: their compilers, and what their loaders need."""

from __future__ import annotations

from typing import NamedTuple

from gqa_kernels.native import manylinux

GLIBC_MINOR = 28  # as torch's own wheels
MANYLINUX = f"manylinux_2_{GLIBC_MINOR}"


class Platform(NamedTuple):
    """A platform.

    Attributes:
        wheel_tag: of the wheel's file name.
        manylinux: the library must run on every Linux of that standard, and is checked to.
        compiler: command of the C++ compiler, a cross compiler on another machine.
        torch: the file of torch that has the functions of its stable ABI.
        torch_name: argument that links a library under the name of that file.
        compile_flags: beyond ``sources.COMPILE_FLAGS``.
        link_flags: of our library.
    """

    wheel_tag: str
    manylinux: bool
    compiler: str
    torch: str
    torch_name: str
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()


def _linux(machine: str) -> Platform:
    return Platform(
        wheel_tag=f"{MANYLINUX}_{machine}",
        manylinux=True,
        compiler=f"{machine}-linux-gnu-g++",  # as Debian names its compilers, native ones too
        torch="libtorch_cpu.so",
        torch_name="-Wl,-soname,libtorch_cpu.so",
        compile_flags=manylinux.COMPILE_FLAGS,
        link_flags=(*manylinux.LINK_FLAGS, "-Wl,--no-as-needed", "-s"),
    )


PLATFORMS = {
    "linux-x86_64": _linux("x86_64"),
    "linux-aarch64": _linux("aarch64"),
    # Xcode's compiler: errors cross the boundary to torch as C++ exceptions, so both must use the
    # system's libc++.
    "macos-arm64": Platform(
        wheel_tag="macosx_14_0_arm64",  # as torch's own wheels
        manylinux=False,
        compiler="clang++ -arch arm64 -mmacosx-version-min=14.0",
        torch="libtorch_cpu.dylib",
        torch_name="-Wl,-install_name,@rpath/libtorch_cpu.dylib",
        link_flags=("-Wl,-undefined,dynamic_lookup",),
    ),
}
