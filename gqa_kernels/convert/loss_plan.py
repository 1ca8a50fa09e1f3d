"""plan_by_loss(): maps that minimise the measured loss of the model for a total of KV heads.

1. ``MergeLosses`` measures what a group costs in a layer's attention output, on held-out tokens.
2. ``search_groups`` finds the partition of least loss for every number of groups, K and V apart:
   the layer's two curves.
3. Weights between layers (:mod:`.sensitivity`) turn losses into nats of the whole model. The
   knapsack of ``grouping.allocate`` spends the total over K, V and layers, and is exact.
4. In each layer, the loss of K's and V's maps together decides between the searched partitions,
   even ones and adjacent heads.

Query heads that read one KV head of the parent stay together, as long as the parent has more KV
heads than the child.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from ..grouping import SearchResult, allocate, search, search_groups, search_groups_curve
from ..grouping.result import canonical_labels
from ..grouping.search.group_costs import EXHAUSTIVE_HEADS, total_cost
from ..grouping.search.partitions import balanced_sizes, blocks
from ..head_map import HeadMap
from ..reporting.progress import track
from .losses import SIDES, MergeLosses

_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # groups offered beyond EXHAUSTIVE_HEADS


@dataclass(frozen=True)
class LossPlan:
    """Maps of all layers and what they cost.

    Attributes:
        results: per layer K's and V's partition; their objectives are losses of the side alone.
        candidates: per layer which rule the maps come from: ``"free"``, ``"equal"``,
            ``"neighbour"``, or two of them for K and V.
        errors: per layer the loss of both maps together.
        curves: per layer ``{"k": {G: loss}, "v": ...}`` (``"shared"`` for one map).
        weights: per layer, nats a token for a loss of 1.
        predicted: sum of the weighted losses of the curves, for the same total spent in two ways:
            ``"by layer"``, the least sum, and ``"equal counts"``, as many KV heads in every layer
            and side as the total allows.
    """

    results: tuple[tuple[SearchResult, SearchResult], ...]
    candidates: tuple[str, ...]
    errors: tuple[float, ...]
    curves: tuple[dict[str, dict[int, float]], ...]
    weights: tuple[float, ...]
    predicted: dict[str, float]

    @property
    def maps(self) -> list[tuple[HeadMap, HeadMap]]:
        """K's and V's map of each layer, for ``convert``."""
        return [(key.head_map, value.head_map) for key, value in self.results]


def plan_by_loss(
    losses: Sequence[MergeLosses],
    weights: Sequence[float],
    *,
    num_kv_heads: int | None = None,
    budget: int | None = None,
    sizes: str = "auto",
    shared: bool = False,
    progress: bool = False,
) -> LossPlan:
    """Search by measured losses.

    Args:
        losses: ``losses_of`` the model. What they have measured they keep, so that plans for
            several totals cost little more than one.
        weights: per layer, of ``layer_weights_by``.
        num_kv_heads, budget, sizes, shared, progress: as for ``plan``.
    """
    sides = ("shared",) if shared else SIDES
    searches = [
        {side: _Side(each, side, sizes, num_kv_heads) for side in sides}
        for each in track(losses, "Searching", shown=progress)
    ]
    curves = [{side: found.curve for side, found in each.items()} for each in searches]
    counts, predicted = _counts(curves, weights, num_kv_heads, budget, 1 + shared)
    results, candidates, errors = [], [], []
    for loss, layer, count in zip(losses, searches, counts, strict=True):
        pair, name, error = _choose(loss, layer, count, sizes)
        results.append(pair)
        candidates.append(name)
        errors.append(error)
    return LossPlan(
        tuple(results), tuple(candidates), tuple(errors), tuple(curves), tuple(weights), predicted
    )


class _Side:
    """The search of one side of one layer.

    Attributes:
        curve: ``{G: loss}`` of the numbers of KV heads that it offers.
    """

    def __init__(self, losses: MergeLosses, side: str, sizes: str, num_kv_heads: int | None):
        cost = losses.shared if side == "shared" else lambda heads: losses(side, heads)
        old = _read_together(losses, SIDES if side == "shared" else (side,))
        self.num_heads, self.cost = losses.num_heads, cost
        self.items = old.groups  # query heads that stay together
        self.sizes = sizes
        self.found: dict[int, SearchResult] = {}
        self._pairs: np.ndarray | None = None
        if sizes == "equal":
            offered = range(1, self.num_heads + 1)
        elif len(self.items) <= EXHAUSTIVE_HEADS:
            table = search_groups_curve(self._item_cost, len(self.items))
            self.found = {G: self._of_items(result) for G, result in table.items()}
            offered = self.found
        else:
            offered = {G for G in (*_GRID, num_kv_heads or 1) if len(self.items) > G}
            offered = sorted(offered | {len(self.items)})
        self.curve = {G: self.result(G).objective for G in offered}

    def result(self, num_groups: int) -> SearchResult:
        """The partition of least loss known, by the rule for sizes."""
        if num_groups not in self.found:
            if self.sizes == "equal":
                self.found[num_groups] = self.even(num_groups)
            elif num_groups > len(self.items):
                self.found[num_groups] = self._split(num_groups)
            else:
                starts = self._starts(num_groups)  # groups are costed on demand
                found = search_groups(self._item_cost, len(self.items), num_groups, starts=starts)
                self.found[num_groups] = self._of_items(found)
        return self.found[num_groups]

    def even(self, num_groups: int) -> SearchResult:
        """The best partition into groups whose sizes differ by at most one.

        If they need not be equal in query heads, KV heads of the parent are counted.
        """
        if self.sizes != "equal" and num_groups > len(self.items):
            return self._split(num_groups)
        count, cost = len(self.items), self._item_cost
        if self.sizes == "equal":
            count, cost = self.num_heads, self.cost
        low, rest = divmod(count, num_groups)
        found = search_groups(cost, count, num_groups, (low, low + bool(rest)))
        return found if self.sizes == "equal" else self._of_items(found)

    def neighbour(self, num_groups: int) -> SearchResult:
        """Adjacent heads together."""
        sizes = balanced_sizes(self.num_heads, num_groups)
        return self._known(blocks(sizes).tolist(), "neighbour")

    def _starts(self, num_groups: int) -> list[tuple[int, ...]]:
        """Partitions that are good by the losses of pairs: of any sizes, and even ones."""
        count = len(self.items)
        if self._pairs is None:
            self._pairs = np.zeros((count, count))
            for i, j in combinations(range(count), 2):
                # A pair costs half its distance in the objective of search.
                self._pairs[i, j] = self._pairs[j, i] = 2 * self._item_cost((i, j))
        low, rest = divmod(count, num_groups)
        rules = ("free", (low, low + bool(rest)))
        return [search(self._pairs, num_groups, "local", sizes).labels for sizes in rules]

    def _item_cost(self, items: Sequence[int]) -> float:
        return self.cost(tuple(sorted(h for i in items for h in self.items[i])))

    def _of_items(self, found: SearchResult) -> SearchResult:
        """A partition of items as one of query heads."""
        labels = [0] * self.num_heads
        for item, label in enumerate(found.labels):
            for h in self.items[item]:
                labels[h] = label
        return SearchResult(
            canonical_labels(labels), found.objective, found.lower_bound, found.proved,
            found.seconds, "loss", found.sizes,
        )  # fmt: skip

    def _split(self, num_groups: int) -> SearchResult:
        """More groups than the parent has KV heads: copies of those, without loss."""
        groups = [list(item) for item in self.items]
        while len(groups) < num_groups:
            largest = max(groups, key=len)
            groups.append([largest.pop()])
        labels = [0] * self.num_heads
        for g, group in enumerate(groups):
            for h in group:
                labels[h] = g
        return self._known(labels, "loss")

    def _known(self, labels: Sequence[int], method: str) -> SearchResult:
        """A partition that was not searched."""
        labels = canonical_labels(labels)
        value = total_cost(self.cost, labels)
        return SearchResult(labels, value, 0.0, value == 0, 0.0, method, "free")


def _read_together(losses: MergeLosses, sides: Sequence[str]) -> HeadMap:
    """Query heads that read the same KV head of all given sides of the parent."""
    read = list(zip(*(losses.old_heads(side).entries for side in sides), strict=True))
    order = {heads: i for i, heads in enumerate(dict.fromkeys(read))}
    return HeadMap([order[heads] for heads in read])


def _counts(
    curves: list[dict[str, dict[int, float]]],
    weights: Sequence[float],
    num_kv_heads: int | None,
    budget: int | None,
    width: int,
) -> tuple[list[dict[str, int]], dict[str, float]]:
    """Groups of each side of each layer, and the losses that the curves predict.

    ``width`` is the number of KV heads that one point of a curve spends.
    """
    places = [(layer, side) for layer, each in enumerate(curves) for side in each]
    weighted = [
        {G: weights[layer] * loss for G, loss in curves[layer][side].items()}
        for layer, side in places
    ]
    equal = num_kv_heads if budget is None else budget // (width * len(places))
    spent = allocate(weighted, (budget // width) if budget is not None else equal * len(places))
    predicted = {"by layer": spent.cost}
    if equal:
        predicted["equal counts"] = sum(c[max(G for G in c if equal >= G)] for c in weighted)
    counts: list[dict[str, int]] = [{} for _ in curves]
    for (layer, side), count in zip(places, spent.num_kv_heads, strict=True):
        counts[layer][side] = count if num_kv_heads is None else num_kv_heads
    return counts, predicted


def _choose(
    loss: MergeLosses, layer: dict[str, _Side], count: dict[str, int], sizes: str
) -> tuple[tuple[SearchResult, SearchResult], str, float]:
    """K's and V's partitions with the least loss together, the rules they come from, the loss."""
    rules: dict[str, Callable[[_Side, int], SearchResult]] = {"free": _Side.result}
    if sizes == "auto":
        rules |= {"equal": _Side.even, "neighbour": _Side.neighbour}
    elif sizes == "equal":
        rules = {"equal": _Side.result}
    options = {
        side: {name: rule(search, count[side]) for name, rule in rules.items()}
        for side, search in layer.items()
    }
    if len(options) == 1:
        (one,) = options.values()
        pairs = [((name, name), (result, result)) for name, result in one.items()]
    else:
        pairs = [
            ((a, b), (options["k"][a], options["v"][b]))
            for a, b in product(options["k"], options["v"])
        ]
    best = None
    for names, pair in pairs:
        error = loss.joint(pair[0].head_map, pair[1].head_map)
        if best is None or error < best[2]:
            best = pair, names[0] if names[0] == names[1] else "/".join(names), error
    return best
