"""plan(): from a calibrated model to maps for all of its layers, in a file that convert reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..grouping import LayerStats, SearchResult, allocate, search, search_curve
from ..grouping.key_norms import key_norms
from ..grouping.merging import check_merging
from ..grouping.search import check_method, subset_dp
from ..grouping.similarity import check_kind, similarity
from ..head_map import HeadMap
from ..models.families import AttentionLayer, attention_layers, layer_weights
from ..models.inputs import Batch
from ..reporting.files import write_atomically
from ..reporting.progress import track
from .loss_plan import plan_by_loss
from .losses import SIDES, losses_of
from .selection import select_maps
from .sensitivity import layer_weights_by

FORMAT = "gqa-kernels plan 3"
LOSS = "loss"  # the kind that measures the loss of whole groups
SIZES = ("free", "equal", "auto")


@dataclass(frozen=True)
class LayerPlan:
    """The conversion of one layer.

    Attributes:
        key, value: the partitions of the query heads.
        restore_norms: whether to scale merged heads.
        error: held-out error of the layer's attention output, None if not measured.
        candidate: the rule that the maps come from: ``"free"``, ``"equal"`` or ``"neighbour"``;
            ``"free/equal"`` if K's and V's differ; ``"joint"`` if both were changed together.
    """

    key: SearchResult
    value: SearchResult
    candidate: str
    restore_norms: bool = False
    error: float | None = None

    @property
    def maps(self) -> tuple[HeadMap, HeadMap]:
        """K's and V's."""
        return self.key.head_map, self.value.head_map


@dataclass(frozen=True)
class Plan:
    """Maps for all layers of a model, and how they were found.

    Attributes:
        kind: what was minimised: ``"loss"``, the held-out error of the merged layer, or a kind of
            similarity, the sum over pairs of heads of a group.
        merging: how to merge heads, a method of ``convert``.
        layers: one entry per attention layer.
        curves: per layer ``{"k": {G: objective}, "v": ...}``. Of a similarity, the least objectives
            for every number of groups up to 18 query heads, Ward's beyond.
        weights: per layer, what a loss of 1 costs the model, in nats a token; of kind ``"loss"``.
        predicted: the model's loss in nats a token by these weights, with the same total of KV
            heads spent ``"by layer"`` and in ``"equal counts"``; of kind ``"loss"``.
        made_from: ``fingerprint(model, batches)`` of the model and the data it was made for; empty
            if unknown.
    """

    kind: str
    merging: str
    layers: tuple[LayerPlan, ...]
    curves: tuple[Mapping[str, Mapping[int, float]], ...] = ()
    made_from: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def maps(self) -> list[tuple[HeadMap, HeadMap]]:
        """For ``convert``."""
        return [layer.maps for layer in self.layers]

    @property
    def restore_norms(self) -> list[bool]:
        """For ``convert``."""
        return [layer.restore_norms for layer in self.layers]

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all."""
        return write_atomically(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            ValueError: no such file, or something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be a plan in JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path} must hold {FORMAT!r}, got something else")
        try:
            return cls._from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a complete plan: {error!r}") from error

    @classmethod
    def _from_dict(cls, data: dict) -> Plan:
        for layer in data["layers"]:
            for side in ("key", "value"):
                layer[side] = SearchResult.from_json(json.dumps(layer[side]))
        layers = tuple(LayerPlan(**layer) for layer in data["layers"])
        curves = tuple(
            {side: {int(g): cost for g, cost in curve.items()} for side, curve in layer.items()}
            for layer in data["curves"]
        )
        return cls(
            data["kind"],
            data["merging"],
            layers,
            curves,
            dict(data["made_from"]),
            tuple(data["weights"]),
            dict(data["predicted"]),
        )


def plan(
    model: nn.Module,
    stats: Sequence[LayerStats] | None,
    num_kv_heads: int | None = None,
    *,
    budget: int | None = None,
    kind: str = LOSS,
    method: str = "exact",
    sizes: str = "auto",
    shared: bool = False,
    merging: str = "low_rank",
    held_out: Iterable[Batch] | None = None,
    weights: str = "kl",
    seed: int = 0,
    progress: bool = False,
) -> Plan:
    """Search maps for every layer of a model.

    Args:
        model: of a known family.
        stats: of ``calibrate``; None for kinds and merging that only need the weights.
        num_kv_heads: K and V heads of each layer.
        budget: instead, K heads plus V heads over all layers, spent where they help most (with
            ``shared``, a KV head counts twice).
        kind: ``"loss"`` minimises what merging does to each layer's output on ``held_out``
            (:mod:`.loss_plan`). Kinds of ``similarity`` minimise a sum over pairs of heads, as
            published methods do.
        method: of ``search``, for kinds of similarity.
        sizes: ``"free"``, ``"equal"``, or ``"auto"``: whichever of the two (and of adjacent heads)
            has the lower attention-output error on ``held_out``, layer by layer. For kinds of
            similarity norms are restored or not by the same error.
        shared: the same map for K and V.
        merging: of ``convert``.
        held_out: batches, needed for ``"loss"`` and ``"auto"``; not those of ``stats``.
        weights: how losses of layers are weighed against each other when the budget is spent, of
            ``sensitivity.WEIGHTS``; for kind ``"loss"``.
        seed: of searches that draw random numbers.
        progress: show a bar if standard error is a terminal.

    Raises:
        ValueError: not just one of ``num_kv_heads`` and ``budget``, no ``held_out`` batches though
            they are needed, or what ``search`` refuses.

    Examples:
        >>> stats = calibrate(model, texts[:48])
        >>> found = plan(model, stats, budget=64, held_out=texts[48:])
        >>> child = convert(model, found.maps, found.merging, moments=stats)
    """
    check_plan(
        model, num_kv_heads, budget=budget, kind=kind, method=method, sizes=sizes, merging=merging
    )
    if held_out is None and (kind == LOSS or sizes == "auto"):
        name = f"kind is {LOSS!r}" if kind == LOSS else "sizes is 'auto'"
        raise ValueError(f"held_out batches must be given if {name}, got None")
    if kind == LOSS:
        return _plan_by_loss(
            model, stats, held_out, num_kv_heads=num_kv_heads, budget=budget, sizes=sizes,
            shared=shared, merging=merging, weights=weights, seed=seed, progress=progress,
        )  # fmt: skip
    layers = attention_layers(model)
    sides = ("shared",) if shared else SIDES
    distances, curves = [], []
    for layer in track(layers, "Searching", shown=progress):
        found = {s: similarity(model, stats, layer.index, s, kind).array for s in sides}
        distances.append(found)
        # For more heads than the subset DP can handle, Ward's linkage finds all curves at once.
        curve = "exact" if layer.num_heads <= subset_dp.MAX_HEADS else "hierarchical"
        curves.append({s: search_curve(D, curve) for s, D in found.items()})
    counts = _counts(curves, num_kv_heads, budget, shared)
    candidates = {}
    for rule in ("free", "equal", "neighbour") if sizes == "auto" else (sizes,):
        candidates[rule] = [
            _results(D, count, rule, method, seed, partial(_options, method, layer, stats))
            for D, count, layer in zip(distances, counts, layers, strict=True)
        ]
    costs = tuple(
        {side: {g: r.objective for g, r in curve.items()} for side, curve in each.items()}
        for each in curves
    )
    if sizes != "auto":
        chosen = tuple(LayerPlan(*results, sizes) for results in candidates[sizes])
        return Plan(kind, merging, chosen, costs)
    selected = select_maps(
        model,
        {rule: [tuple(r.head_map for r in each) for each in c] for rule, c in candidates.items()},
        held_out,
        merging,
        moments=stats,
    )
    chosen = tuple(
        LayerPlan(*candidates[name][layer], name, selected.restore_norms[layer], error)
        for layer, (name, error) in enumerate(zip(selected.names, selected.errors, strict=True))
    )
    return Plan(kind, merging, chosen, costs)


def _plan_by_loss(
    model: nn.Module,
    stats: Sequence[LayerStats] | None,
    held_out: Iterable[Batch],
    *,
    merging: str,
    weights: str,
    seed: int,
    progress: bool,
    **options: Any,
) -> Plan:
    batches = list(held_out)
    losses = losses_of(model, stats, batches, merging, seed=seed, progress=progress)
    worth = layer_weights_by(weights, model, batches, losses, stats, seed=seed, progress=progress)
    found = plan_by_loss(losses, worth, progress=progress, **options)
    layers = tuple(
        LayerPlan(*results, candidate, error=error)
        for results, candidate, error in zip(
            found.results, found.candidates, found.errors, strict=True
        )
    )
    return Plan(
        LOSS, merging, layers, found.curves, weights=found.weights, predicted=found.predicted
    )


def check_plan(
    model: nn.Module,
    num_kv_heads: int | None,
    *,
    budget: int | None,
    kind: str,
    method: str,
    sizes: str,
    merging: str,
) -> None:
    """Raise what ``plan`` would raise for these arguments, before data is collected.

    Raises:
        ValueError: an unknown name, or a number of KV heads that a layer can't have.
    """
    if (num_kv_heads is None) == (budget is None):
        raise ValueError(
            f"one of num_kv_heads and budget must be given, got {num_kv_heads} and {budget}"
        )
    if kind != LOSS:
        check_kind(kind)
    elif method != "exact":
        raise ValueError(f"method must be 'exact' if kind is {LOSS!r}, got {method!r}")
    check_method(method)
    check_merging(merging)
    if sizes not in SIZES:
        raise ValueError(f"sizes must be one of {', '.join(SIZES)}, got {sizes!r}")
    layers = attention_layers(model)
    heads = min(layer.num_heads for layer in layers)
    if num_kv_heads is not None and not 1 <= num_kv_heads <= heads:
        raise ValueError(f"num_kv_heads must lie in [1, {heads}], got {num_kv_heads}")
    if budget is not None and budget < 2 * len(layers):
        raise ValueError(
            f"budget must be at least {2 * len(layers)}, a K and a V head for each of "
            f"{len(layers)} layers, got {budget}"
        )


def _counts(
    curves: list[dict], num_kv_heads: int | None, budget: int | None, shared: bool
) -> list[dict[str, int]]:
    """Groups of each side of each layer."""
    if budget is None:
        return [dict.fromkeys(each, num_kv_heads) for each in curves]
    places = [(layer, side) for layer, each in enumerate(curves) for side in each]
    spent = allocate([curves[layer][side] for layer, side in places], budget // (1 + shared))
    counts: list[dict[str, int]] = [{} for _ in curves]
    for (layer, side), count in zip(places, spent.num_kv_heads, strict=True):
        counts[layer][side] = count
    return counts


def _results(
    distances: dict,
    counts: dict[str, int],
    rule: str,
    method: str,
    seed: int,
    options: Callable[[int], dict[str, Any]],
) -> tuple[SearchResult, SearchResult]:
    """K's and V's partitions by one rule; ``options(G)`` are those of the method."""
    found = {}
    for side, D in distances.items():
        heads, groups = len(D), counts[side]
        if rule == "neighbour":
            found[side] = search(D, groups, "neighbour")
        else:
            # If the heads don't divide, "equal" means sizes that differ by at most one.
            low = heads // max(groups, 1)
            limits = (low, low + 1) if rule == "equal" and groups and heads % groups else rule
            found[side] = search(D, groups, method, sizes=limits, seed=seed, **options(groups))
    return tuple(found.values()) * (1 if len(found) == 2 else 2)


def _options(
    method: str, layer: AttentionLayer, stats: Sequence[LayerStats] | None, num_groups: int
) -> dict[str, Any]:
    """What a method needs to know about a layer beside its distances."""
    if method != "key_norm":
        return {}
    moments = None if stats is None else stats[layer.index]
    return {"norms": key_norms(layer_weights(layer), num_groups, moments).numpy()}
