"""Offline grouping: which query heads share a KV head, and how to merge the KV heads that fall together."""

from .objective import objective
from .result import SearchResult
from .search import search, search_curve

__all__ = ["SearchResult", "objective", "search", "search_curve"]
