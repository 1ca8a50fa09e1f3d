"""Optimal partitions by listing every one: what the exact methods are checked against."""

from itertools import combinations


def partitions(n):
    """Every partition of ``n`` heads, as labels numbered by first appearance."""

    def extend(labels, groups):
        if len(labels) == n:
            yield tuple(labels)
            return
        for g in range(groups + 1):
            yield from extend([*labels, g], max(groups, g + 1))

    yield from extend([], 0)


def cost(D, labels):
    total = 0.0
    for g in set(labels):
        members = [h for h, label in enumerate(labels) if label == g]
        total += sum(D[i][j] for i, j in combinations(members, 2)) / len(members)
    return total


def sizes_of(labels):
    return [labels.count(g) for g in sorted(set(labels))]


def allowed(labels, sizes):
    """Whether the group sizes obey a rule."""
    counts = sizes_of(labels)
    if sizes == "free":
        return True
    if sizes == "equal":
        return len(set(counts)) == 1
    return sizes[0] <= min(counts) and max(counts) <= sizes[1]


def optima(D, sizes):
    """``{G: least cost}`` over all partitions that obey the rule."""
    best = {}
    for labels in partitions(len(D)):
        if allowed(labels, sizes):
            G = max(labels) + 1
            best[G] = min(best.get(G, float("inf")), cost(D, labels))
    return best
