"""Attention kernels for asymmetric grouped-query attention.

The public names are those of ``public.py``. They are loaded, and torch with them, when one is first
used: the command line must answer without torch, too, and set what torch reads when it is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":  # the import system asks for several
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module(".public", __name__)
        globals().update({each: getattr(public, each) for each in public.__all__})
        globals()["__all__"] = public.__all__
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        public = import_module(".public", __name__)
        return sorted({*globals(), *public.__all__})
