"""plan_by_loss(): maps that minimise the measured loss of the model for a total of KV heads.

1. ``MergeLosses`` measures what a group costs in a layer's attention output, on held-out tokens.
2. ``search_groups`` finds the partition of least loss for every number of groups, K and V apart:
   the layer's two curves.
3. Weights between layers (:mod:`.sensitivity`) turn losses into nats of the whole model. The
   knapsack of ``grouping.allocate`` spends the total over K, V and layers, and is exact.
4. In each layer, the loss of K's and V's maps together decides between the searched partitions,
   even ones and adjacent heads. (With more heads than ``EXHAUSTIVE_HEADS``, even and adjacent
   partitions are starts of the search instead.) If the two losses don't add up to it, a descent
   changes both maps (:mod:`.joint_descent`).

Query heads that read one KV head of the parent stay together, as long as the parent has more KV
heads than the child.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, product

import numpy as np

from ..grouping import SearchResult, allocate, search_groups, search_groups_curve
from ..grouping.result import Sizes, canonical_labels
from ..grouping.search import local
from ..grouping.search.group_costs import EXHAUSTIVE_HEADS, total_cost
from ..grouping.search.partitions import balanced_sizes, blocks, even_limits
from ..grouping.search.problem import Problem
from ..head_map import HeadMap
from ..reporting.progress import track
from .joint_descent import Labels, descend_together
from .losses import SIDES, Group, MergeLosses


@dataclass(frozen=True)
class LossPlan:
    """Maps of all layers and what they cost.

    Attributes:
        results: per layer K's and V's partition; their objectives are losses of the side alone.
        candidates: per layer which rule the maps come from: ``"free"``, ``"equal"``,
            ``"neighbour"``, or two of them for K and V; ``"joint"`` if the descent over both maps
            changed them.
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
    places, width = len(losses) * len(sides), 1 + shared
    average = num_kv_heads or (budget or 0) // (width * places)
    searches = [
        {side: Side(each, side, sizes, average, max(1, average // 2)) for side in sides}
        for each in track(losses, "Searching", shown=progress)
    ]
    curves = [{side: found.curve for side, found in each.items()} for each in searches]
    counts, predicted = counts_of(curves, weights, num_kv_heads, budget, width)
    results, candidates, errors = [], [], []
    for loss, layer, count in zip(losses, searches, counts, strict=True):
        pair, name, error = choose(loss, layer, count, sizes)
        results.append(pair)
        candidates.append(name)
        errors.append(error)
    return LossPlan(
        tuple(results), tuple(candidates), tuple(errors), tuple(curves), tuple(weights), predicted
    )


class Side:
    """The search of one side of one layer.

    Heads here are items: query heads that read one KV head of the parent stay together.

    Attributes:
        items: the query heads of each item.
        curve: ``{G: loss}`` of the numbers of KV heads that it offers.
        pairs: ``[n, n]`` distances of items: twice what merging two loses, estimated.
        all_known: whether the loss of every group is known.
    """

    def __init__(self, losses: MergeLosses, side: str, sizes: str, wanted: int, fewest: int):
        """``wanted``: a number of KV heads to offer. ``fewest``: of many heads, the least to."""
        self._losses, self._side = losses, side
        self._loss = losses.shared if side == "shared" else partial(losses, side)
        self.num_heads = losses.num_heads
        if sizes == "equal":  # of query heads, so that none stay together
            self.items: tuple[Group, ...] = tuple((h,) for h in range(self.num_heads))
        else:
            self.items = _read_together(losses, SIDES if side == "shared" else (side,)).groups
        self.sizes, count = sizes, len(self.items)
        self.all_known = count <= EXHAUSTIVE_HEADS
        self._found: dict[int, SearchResult] = {}
        if sizes == "equal":
            offered = [G for G in range(1, count + 1) if self.all_known or count % G == 0]
            offered = sorted({*offered, min(max(1, wanted), count)})
            self.curve = {G: self.result(G).objective for G in offered}
        else:
            pairs = None if self.all_known else self.pairs / 2
            self._of = search_groups_curve(self.cost, count, pairs=pairs, fewest=fewest)
            self.curve = {G: each.objective for G, each in self._of.items()}

    def offered(self) -> dict[int, SearchResult]:
        """The partition behind each point of the curve."""
        if self.sizes == "equal":
            return {G: self.result(G) for G in self.curve}
        return {G: self.of_items(found) for G, found in self._of.items()}

    @cached_property
    def pairs(self) -> np.ndarray:
        count = len(self.items)
        if count == self.num_heads:
            return 2 * self._losses.pairs(self._side)
        pairs = np.zeros((count, count))
        for i, j in combinations(range(count), 2):
            pairs[i, j] = pairs[j, i] = 2 * self.cost((i, j))
        return pairs

    def limits(self, num_groups: int) -> tuple[int, int]:
        """Least and largest group by the rule for sizes."""
        count = len(self.items)
        return even_limits(count, num_groups) if self.sizes == "equal" else (1, count)

    def cost(self, items: Sequence[int]) -> float:
        """The loss of merging some items."""
        return self._loss(tuple(sorted(h for i in items for h in self.items[i])))

    def result(self, num_groups: int) -> SearchResult:
        """The partition of least loss known, by the rule for sizes."""
        if num_groups not in self._found:
            if self.sizes == "equal":
                self._found[num_groups] = self.even(num_groups)
            elif num_groups > len(self.items):
                self._found[num_groups] = self._split(num_groups)
            else:
                found = self._of[num_groups]
                if not found.proved:
                    limits = even_limits(len(self.items), num_groups)
                    even = local.solve(Problem.create(self.pairs, num_groups, limits)).labels
                    found = self._search(num_groups, "free", [found.labels, even.tolist()])
                self._found[num_groups] = self.of_items(found)
        return self._found[num_groups]

    def even(self, num_groups: int) -> SearchResult:
        """The best partition into groups whose sizes differ by at most one item."""
        if num_groups > len(self.items):
            return self._split(num_groups)
        limits = even_limits(len(self.items), num_groups)
        return self.of_items(self._search(num_groups, limits))

    def _search(
        self, num_groups: int, sizes: Sizes, starts: Sequence[Sequence[int]] = ()
    ) -> SearchResult:
        count = len(self.items)
        return search_groups(
            self.cost, count, num_groups, sizes,
            starts=starts, patience=count,
            pairs=None if self.all_known else self.pairs / 2,
        )  # fmt: skip

    def joined(self, labels: Sequence[int]) -> SearchResult:
        """A partition of items that the search of both sides found. The bound on its loss is that
        of the search of this side."""
        value, like = total_cost(self.cost, labels), self.result(max(labels) + 1)
        bound = min(like.lower_bound, value)
        found = SearchResult(
            canonical_labels(labels), value, bound, bound == value, like.seconds, "loss", like.sizes
        )
        return self.of_items(found)

    def items_of(self, found: SearchResult) -> tuple[int, ...] | None:
        """The labels of items; None if the partition splits one."""
        labels = []
        for item in self.items:
            if len({found.labels[h] for h in item}) > 1:
                return None
            labels.append(found.labels[item[0]])
        return canonical_labels(labels)

    def neighbour(self, num_groups: int) -> SearchResult:
        """Adjacent heads together."""
        sizes = balanced_sizes(self.num_heads, num_groups)
        return self._known(blocks(sizes).tolist(), "neighbour")

    def labels_of(self, item_labels: Sequence[int]) -> tuple[int, ...]:
        """A partition of items as one of query heads."""
        labels = [0] * self.num_heads
        for item, label in zip(self.items, item_labels, strict=True):
            for h in item:
                labels[h] = label
        return canonical_labels(labels)

    def of_items(self, found: SearchResult) -> SearchResult:
        """A result for items as one for query heads."""
        return replace(found, labels=self.labels_of(found.labels), method="loss")

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
        value = total_cost(self._loss, labels)
        return SearchResult(labels, value, 0.0, value == 0, 0.0, method, "free")


def _read_together(losses: MergeLosses, sides: Sequence[str]) -> HeadMap:
    """Query heads that read the same KV head of all given sides of the parent."""
    read = list(zip(*(losses.old_heads(side).entries for side in sides), strict=True))
    order = {heads: i for i, heads in enumerate(dict.fromkeys(read))}
    return HeadMap([order[heads] for heads in read])


def counts_of(
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


def choose(
    loss: MergeLosses, layer: dict[str, Side], count: dict[str, int], sizes: str
) -> tuple[tuple[SearchResult, SearchResult], str, float]:
    """K's and V's partitions with the least loss together, the rules they come from, the loss."""
    rules: dict[str, Callable[[Side, int], SearchResult]] = {"free": Side.result}
    all_known = all(search.all_known for search in layer.values())
    if sizes == "auto" and all_known:
        rules |= {"equal": Side.even, "neighbour": Side.neighbour}
    elif sizes == "equal":
        rules = {"equal": Side.result}
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
    assert best is not None
    return _joined(loss, layer, *best)


def _joined(
    loss: MergeLosses,
    layer: dict[str, Side],
    pair: tuple[SearchResult, SearchResult],
    name: str,
    error: float,
) -> tuple[tuple[SearchResult, SearchResult], str, float]:
    """The choice for a layer after a descent over both maps together."""
    results = dict(zip(layer, pair, strict=False))
    start = {side: layer[side].items_of(found) for side, found in results.items()}
    if error == 0 or None in start.values():
        return pair, name, error

    def maps(labels: Mapping[str, Labels]) -> tuple[HeadMap, HeadMap]:
        found = tuple(HeadMap(layer[side].labels_of(each)) for side, each in labels.items())
        return found[0], found[-1]

    labels, value = descend_together(layer, start, lambda labels: loss.joint(*maps(labels)))
    if value >= error:
        return pair, name, error
    found = [layer[side].joined(each) for side, each in labels.items()]
    return (found[0], found[-1]), "joint", value
