"""Offline grouping: which query heads share a KV head, and how many KV heads each layer gets."""

from .budget import Allocation, allocate
from .calibration import LayerStats, calibrate
from .objective import objective
from .result import SearchResult
from .search import METHODS, search, search_curve
from .similarity import Dissimilarity, similarity

__all__ = [
    "METHODS",
    "Allocation",
    "Dissimilarity",
    "LayerStats",
    "SearchResult",
    "allocate",
    "calibrate",
    "objective",
    "search",
    "search_curve",
    "similarity",
]
