"""Makes a library run on every Linux of manylinux_2_28 and newer, whichever compiler builds it.

The library must not need a newer function of glibc or libstdc++ than that standard allows. Usually
one builds on an old system. Instead, these flags bind calls to the old versions of functions, and
define in the library what old systems lack. ``auditwheel`` checks the result.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "newer.cpp"
COMPILE_FLAGS = ("-include", str(FOLDER / "old_versions.h"))
# Only our own C functions are visible, so no other library binds to the functions defined here.
LINK_FLAGS = (f"-Wl,--version-script={FOLDER / 'exports.map'}",)
