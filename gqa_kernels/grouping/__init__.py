"""Offline grouping: which query heads share a KV head, and how many KV heads each layer gets."""

from .budget import Allocation, allocate
from .calibration import LayerStats, calibrate
from .evaluation import layer_errors
from .merging import MERGING, align_layer, merge_layer
from .objective import objective
from .result import SearchResult
from .search import METHODS, search, search_curve, search_groups
from .selection import Selection, select_maps
from .similarity import Dissimilarity, similarity

__all__ = [
    "MERGING",
    "METHODS",
    "Allocation",
    "Dissimilarity",
    "LayerStats",
    "SearchResult",
    "Selection",
    "align_layer",
    "allocate",
    "calibrate",
    "layer_errors",
    "merge_layer",
    "objective",
    "search",
    "search_curve",
    "search_groups",
    "select_maps",
    "similarity",
]
