"""Two texts: one to calibrate on, the other to measure perplexity on.

Both are chapters of the Python language reference, which CPython ships for ``help()``. They are
real English prose that every machine has, so nothing is downloaded.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, tensor

from ..reporting.errors import UsageError

CALIBRATION_TOPICS = (
    "objects", "execmodel", "naming", "import", "customization", "attribute-access", "types",
    "function", "class", "with", "async", "calls",
)  # fmt: skip
EVALUATION_TOPICS = (
    "assignment", "try", "raise", "comparisons", "strings", "identifiers", "numeric-types",
    "sequence-types", "exceptions", "operator-summary",
)  # fmt: skip
CALIBRATION = f"Python language reference: {', '.join(CALIBRATION_TOPICS)}"
EVALUATION = f"Python language reference: {', '.join(EVALUATION_TOPICS)}"


def calibration_text() -> str:
    """The chapters for calibration."""
    return _chapters(CALIBRATION_TOPICS)


def evaluation_text() -> str:
    """The chapters for evaluation, which calibration does not use."""
    return _chapters(EVALUATION_TOPICS)


def rows(tokenizer: Any, text: str, shape: tuple[int, int]) -> Tensor:
    """The first tokens of ``text``, cut into consecutive pieces: ``[texts, length]``."""
    count, length = shape
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < count * length:
        raise UsageError(f"the text must have {count * length} tokens, got {len(ids)}")
    return tensor(ids[: count * length]).view(count, length)


def _chapters(names: tuple[str, ...]) -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(f"the texts need Python's complete standard library: {error}") from None
    text = " ".join(topics[name] for name in names if name in topics)
    return re.sub(r"\s+", " ", text).strip()
