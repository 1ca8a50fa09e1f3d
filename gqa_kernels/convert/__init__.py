"""Conversion of Hugging Face models: other KV heads, the same queries.

::

    child = convert(model, maps, merging="mean")
    save(child, "child", processor=tokenizer)
    child = load("child")

Families: ``families.py``.
"""

from .checkpoint import load, save
from .model import convert
from .split import random_split

__all__ = ["convert", "load", "random_split", "save"]
