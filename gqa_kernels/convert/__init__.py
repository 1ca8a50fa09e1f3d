"""Conversion of Hugging Face models: other KV heads, the same queries."""

from .model import convert
from .split import random_split

__all__ = ["convert", "random_split"]
