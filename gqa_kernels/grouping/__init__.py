"""Offline grouping: which query heads share a KV head, how the KV heads of a group become one, and
how many KV heads each layer gets.

    calibrate -> similarity -> search, search_curve -> allocate -> merge_layer

- ``space.py``: the moments of a layer's heads; ``symmetry.py``: their free changes of basis.
- ``similarity.py``: how unlike two heads are; ``objective.py``: the cost of a partition.
- ``search/``: one method a file; ``result.py``: labels, objective, lower bound, proof.
- ``merging.py``: one head out of several, with ``alignment.py`` and ``low_rank.py``.
- ``evaluation.py``: held-out error of each layer; ``budget.py``: KV heads for each layer.

The package only reads models, through ``gqa_kernels.models``; ``gqa_kernels.convert`` changes them.
"""

from .budget import Allocation, allocate
from .calibration import LayerStats, calibrate
from .evaluation import layer_errors
from .merging import MERGING, align_layer, merge_layer
from .objective import objective
from .result import SearchResult
from .search import METHODS, search, search_curve, search_groups, search_groups_curve
from .similarity import Dissimilarity, similarity

__all__ = [
    "MERGING",
    "METHODS",
    "Allocation",
    "Dissimilarity",
    "LayerStats",
    "SearchResult",
    "align_layer",
    "allocate",
    "calibrate",
    "layer_errors",
    "merge_layer",
    "objective",
    "search",
    "search_curve",
    "search_groups",
    "search_groups_curve",
    "similarity",
]
