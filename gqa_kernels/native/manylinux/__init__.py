"""What makes a library that any compiler builds run on every Linux of manylinux_2_28 and newer.

It must need no newer function of glibc or libstdc++ than that standard allows. The usual means is
to build on an old system. These flags do without: calls are bound to the functions' old versions,
and what is missing there is defined in the library. ``auditwheel`` checks the result.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "newer.cpp"
COMPILE_FLAGS = ("-include", str(FOLDER / "old_versions.h"))
# Only our own C functions are visible: no other library binds to what is defined here.
LINK_FLAGS = (f"-Wl,--version-script={FOLDER / 'exports.map'}",)
