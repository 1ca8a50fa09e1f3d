"""The transformers releases that the tests ran with, and what happens with others."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

OLDEST = "4.57"  # first release that the tests ran with
NEWEST = "5.24"  # last one; newer releases get one warning
BATCHING = "5.23"  # first release whose continuous batching was tested


def require_transformers(oldest: str = OLDEST) -> None:
    """Raise ImportError, with the version needed, unless transformers is there and new enough.

    A release newer than all tested ones gets one warning per process.
    """
    problem = None
    try:
        found = version("transformers")
        import transformers.masking_utils  # noqa: F401
    except PackageNotFoundError:
        problem = "it is not installed"
    except ImportError as error:
        problem = f"{found} can't be imported: {error}"
    else:
        if release(found) < release(oldest):
            problem = f"found {found}"
    if problem:
        raise ImportError(
            f"gqa_kernels.integrations.transformers needs transformers >= {oldest} "
            f"(pip install 'transformers>={oldest}'): {problem}"
        )
    if release(found) > release(NEWEST):
        _warn_untested(found)


def installed() -> tuple[int, int]:
    """Major and minor number of the installed transformers."""
    return release(version("transformers"))


def release(text: str) -> tuple[int, int]:
    """Major and minor number of a version: ``"5.24.0.dev0"`` -> ``(5, 24)``."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@cache
def _warn_untested(found: str) -> None:
    warnings.warn(
        f"gqa_kernels was tested with transformers {OLDEST} to {NEWEST}, found {found}: compare "
        "results with attn_implementation='eager' on an ordinary model, or install "
        f"'transformers~={NEWEST}.0'",
        stacklevel=3,
    )
