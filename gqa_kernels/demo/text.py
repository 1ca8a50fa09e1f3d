"""The demo's two texts: one to calibrate on, another one to measure perplexity on."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from torch import Tensor, tensor

from .errors import DemoError

CALIBRATION = "Python language reference (pydoc_data)"
EVALUATION = "Alice's Adventures in Wonderland, chapters I to III"
# Chapters of the reference that are mostly prose.
TOPICS = ("objects", "execmodel", "naming", "import", "customization", "attribute-access")
TOPICS += ("types", "function", "class", "with", "async", "calls")


def calibration_text() -> str:
    """Prose of the Python language reference, which CPython ships for ``help()``."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(f"the demo needs Python's complete standard library: {error}") from None
    return _one_line(" ".join(topics[name] for name in TOPICS if name in topics))


def evaluation_text() -> str:
    """The beginning of a novel, in the public domain."""
    return _one_line(files(__package__).joinpath("alice.txt").read_text(encoding="utf-8"))


def rows(tokenizer: Any, text: str, shape: tuple[int, int]) -> Tensor:
    """The first tokens of ``text`` as ``[texts, length]``, consecutive pieces."""
    count, length = shape
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < count * length:
        raise DemoError(f"the text must have {count * length} tokens, got {len(ids)}")
    return tensor(ids[: count * length]).view(count, length)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
