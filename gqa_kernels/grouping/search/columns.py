"""Every group within the size limits, as the columns of the set-partitioning problem."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from scipy.sparse import csc_array, vstack

from .core import core

_CHUNK = 1 << 15  # columns priced at once: what stays in cache


def number_of_groups(num_heads: int, lo: int, hi: int) -> int:
    """How many groups of ``lo`` to ``hi`` of ``num_heads`` heads there are."""
    return sum(comb(num_heads, size) for size in range(lo, hi + 1))


@dataclass(frozen=True)
class Columns:
    """``n`` groups of heads.

    Attributes:
        members: uint8 ``[K, n]``, the heads of each group, padded with ``H`` to K entries.
        costs: ``[n]``.
        num_heads: ``H``.
    """

    members: np.ndarray
    costs: np.ndarray
    num_heads: int

    @classmethod
    def of_partition(cls, D: np.ndarray, labels: np.ndarray, width: int) -> Columns:
        """The groups of one partition, in columns of ``width`` entries."""
        groups = [np.flatnonzero(labels == g) for g in np.unique(labels)]
        members = np.full((width, len(groups)), len(D), np.uint8)
        for g, group in enumerate(groups):
            members[: len(group), g] = group
        costs = [D[np.ix_(group, group)].sum() / (2 * len(group)) for group in groups]
        return cls(members, np.array(costs), len(D))

    @classmethod
    def enumerate(cls, D: np.ndarray, lo: int, hi: int) -> Columns:
        """All groups of ``lo`` to ``hi`` heads, each grown from one with a head less."""
        H = len(D)
        total = number_of_groups(H, lo, hi)
        compiled = core(H)
        if compiled is not None:
            return cls(*compiled.list_columns(D, lo, hi, total), H)
        members = np.full((hi, total), H, np.uint8)
        costs = np.empty(total)
        grown, pairs = [np.arange(H, dtype=np.uint8)], np.zeros(H)
        end = 0
        for size in range(1, hi + 1):
            if size > 1:
                last = grown[-1].astype(np.intp)
                later = H - 1 - last  # heads that may follow
                parent = np.repeat(np.arange(len(last)), later)
                new = np.arange(len(parent)) - np.repeat(np.cumsum(later) - later - last - 1, later)
                grown, pairs = [m[parent] for m in grown], pairs[parent]
                for m in grown:
                    pairs += D[m, new]
                grown.append(new.astype(np.uint8))
            if size >= lo:
                start, end = end, end + len(pairs)
                costs[start:end] = pairs / size
                for k, m in enumerate(grown):
                    members[k, start:end] = m
        return cls(members, costs, H)

    def __len__(self) -> int:
        return len(self.costs)

    def __add__(self, other: Columns) -> Columns:
        return Columns(
            np.concatenate((self.members, other.members), axis=1),
            np.concatenate((self.costs, other.costs)),
            self.num_heads,
        )

    def take(self, index: np.ndarray) -> Columns:
        return Columns(self.members[:, index], self.costs[index], self.num_heads)

    def reduced_costs(self, prices: np.ndarray) -> np.ndarray:
        """``[n]`` cost of each group less the prices ``[H]`` of its heads."""
        prices = np.append(prices, 0.0)
        compiled = core(self.num_heads)
        if compiled is not None:
            return compiled.reduced_costs(self.members, self.costs, prices)
        result = self.costs.copy()
        for start in range(0, len(result), _CHUNK):
            part = slice(start, start + _CHUNK)
            for row in self.members:
                result[part] -= prices[row[part]]
        return result

    def incidence(self) -> csc_array:
        """``[H, n]``, 1 if the head is in the group."""
        present = np.not_equal(self.members.T, self.num_heads)
        ends = np.cumsum(present.sum(1))
        heads = self.members.T[present].astype(np.int32)
        return csc_array(
            (np.ones(len(heads)), heads, np.append(0, ends)), shape=(self.num_heads, len(self))
        )

    def partition_rows(self) -> csc_array:
        """``[H + 1, n]``: the incidence, and a row of ones that counts the groups."""
        return vstack([self.incidence(), csc_array(np.ones((1, len(self))))], format="csc")

    def labels(self, chosen: np.ndarray) -> np.ndarray:
        """``[H]`` labels of the partition made of the chosen columns."""
        labels = np.full(self.num_heads, -1, np.intp)
        for g, column in enumerate(chosen):
            heads = self.members[:, column]
            labels[heads[heads < self.num_heads]] = g
        return labels
