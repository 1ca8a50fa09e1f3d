"""Offline grouping: which query heads share a KV head, how the KV heads of a group become one, and
how many KV heads each layer gets.

    calibrate -> similarity -> search, search_curve -> select_maps, allocate -> merge_layer

- ``weights.py``: a layer by head; ``space.py``: its moments; ``symmetry.py``: what may be turned.
- ``similarity.py``: how unlike two heads are; ``objective.py``: what a partition costs.
- ``search/``: one method a file; ``result.py``: labels, objective, lower bound, proof.
- ``merging.py``: one head out of several, with ``alignment.py`` and ``low_rank.py``.
- ``evaluation.py``: held-out error of each layer; ``selection.py``, ``budget.py``: what to do with
  it.
"""

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
