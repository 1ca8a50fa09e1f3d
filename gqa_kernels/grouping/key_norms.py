"""key_norms(): how large the keys of pooled KV heads are, for the search method ``key_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.weights import LayerWeights
from .search.partitions import balanced_sizes
from .space import Moments, augmented, mean_energy, normalised


def key_norms(weights: LayerWeights, num_groups: int, moments: Moments | None = None) -> Tensor:
    """Root mean square norm of the keys of each pooled KV head: fp64 ``[G]``.

    KDGQA and DGQA (arXiv 2408.08454) start from ordinary GQA: the keys of adjacent query heads are
    averaged, in groups of equal size. If the heads don't divide, sizes differ by at most one.

    Args:
        num_groups: ``G``.
        moments: of the input of K; None takes inputs of uncorrelated components with variance 1.

    Raises:
        ValueError: ``num_groups`` is below 1 or above the number of query heads.
    """
    if not 1 <= num_groups <= weights.num_heads:
        raise ValueError(f"num_groups must lie in [1, {weights.num_heads}], got {num_groups}")
    keys = weights.rows("k").detach().double().cpu()[list(weights.key_map.entries)]
    sizes = balanced_sizes(weights.num_heads, num_groups).tolist()
    pooled = torch.stack([part.mean(0) for part in keys.split(sizes)])
    sigma = None
    if moments is not None:
        mean, sigma = moments.mean.double().cpu(), moments.second_moment.double().cpu()
        if weights.k_bias is not None:
            sigma = augmented(mean, sigma)
    if weights.k_norm is not None:
        pooled = normalised(pooled, sigma) * weights.k_norm.double().cpu()[:, None]
    return mean_energy(pooled, sigma).sqrt()
