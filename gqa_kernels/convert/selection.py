"""select_maps(): the best of several conversions, layer by layer.

No rule (even or uneven groups, norms restored or not) is best in every layer, and a lower objective
of the search doesn't always mean a lower error. The attention-output error on held-out inputs
decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..grouping.evaluation import layer_errors
from ..grouping.moments import LayerStats
from ..head_map import HeadMap
from ..models.inputs import Batch
from .model import convert

LayerMaps = Sequence[tuple[HeadMap, HeadMap]]


@dataclass(frozen=True)
class Selection:
    """The choice for every layer; ``convert(parent, maps, merging, restore_norms=...)`` makes it.

    Attributes:
        names: ``[L]`` candidate chosen.
        maps: ``[L]`` its map of K and of V.
        restore_norms: ``[L]`` whether merged heads are scaled.
        errors: ``[L]`` its held-out error.
        tried: ``{(candidate, norms restored): [L] errors}``.
    """

    names: tuple[str, ...]
    maps: tuple[tuple[HeadMap, HeadMap], ...]
    restore_norms: tuple[bool, ...]
    errors: tuple[float, ...]
    tried: Mapping[tuple[str, bool], tuple[float, ...]]


def select_maps(
    parent: nn.Module,
    candidates: Mapping[str, LayerMaps],
    batches: Iterable[Batch],
    merging: str = "aligned",
    *,
    moments: Sequence[LayerStats] | None = None,
    restore_norms: Sequence[bool] = (False, True),
    attention: str = "asym_gqa",
) -> Selection:
    """For every layer the candidate whose conversion changes its attention output least.

    Args:
        parent: a Hugging Face model of a known family.
        candidates: by name, the maps of all layers. Of equal errors the first wins.
        batches: held-out inputs, not those of ``moments``; used once for each candidate.
        merging, moments: as for ``convert``.
        restore_norms: which of False and True to try.
        attention: attention implementation that the children run with.

    Raises:
        ValueError: there are no candidates, or ``convert`` refuses one.

    Examples:
        >>> chosen = select_maps(model, candidates, held_out)
    """
    if not candidates or not restore_norms:
        raise ValueError(
            f"candidates and restore_norms must not be empty, got {list(candidates)} and "
            f"{list(restore_norms)}"
        )
    batches = list(batches)
    tried = {}
    for name, maps in candidates.items():
        for restored in restore_norms:
            child = convert(
                parent, maps, merging, moments=moments, restore_norms=restored, share_weights=True
            )
            child.set_attn_implementation(attention)
            tried[name, restored] = tuple(layer_errors(parent, child, batches))
    layers = range(len(next(iter(tried.values()))))
    best = [min(tried, key=lambda each: tried[each][layer]) for layer in layers]
    return Selection(
        names=tuple(name for name, _ in best),
        maps=tuple(candidates[name][layer] for layer, (name, _) in enumerate(best)),
        restore_norms=tuple(restored for _, restored in best),
        errors=tuple(tried[each][layer] for layer, each in enumerate(best)),
        tried=tried,
    )
