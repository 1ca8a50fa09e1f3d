"""How many query heads each KV head gets, from the norms of its keys (arXiv 2408.08454).

With ``n_g = sum over the batch of ||K_{b,g}||_F``, query heads are assigned in proportion to

    kdgqa       (n - min n) / (max n - min n), at every forward in training
    dgqa-diff   |n - n'|, n' the norms one window of steps before
    dgqa-ema    0.9 n + 0.1 n', n' the average so far, once in a window

by largest remainders. Each KV head takes consecutive query heads. Differences from the published
code: rounding uses no random corrections, the host never reads device memory, and evaluation keeps
the last map, so that an output never depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ALLOCATIONS = ("kdgqa", "dgqa-diff", "dgqa-ema")
EMA_WEIGHT = 0.9  # of the current norms


def key_norms(k: Tensor) -> Tensor:
    """Frobenius norms of each KV head's keys, summed over the batch: fp32 ``[Hkv]``.

    Args:
        k: ``[B, S, Hkv, D]``.
    """
    return k.detach().float().square().sum(dim=(1, 3)).sqrt().sum(dim=0)


def largest_remainders(shares: Tensor, total: int) -> Tensor:
    """Integers ``[G]`` in proportion to ``shares`` that sum to ``total``, without synchronisation.

    Among equal remainders the first are rounded up. If all shares are zero, they count as equal.
    """
    shares = shares.double().nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
    shares = torch.where(shares.sum() > 0, shares, 1.0)
    quotas = shares / shares.sum() * total
    sizes = quotas.floor()
    order = (quotas - sizes).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (sizes + (rank < total - sizes.sum())).long()


def contiguous_map(sizes: Tensor, num_heads: int) -> Tensor:
    """The head map int32 ``[Hq]`` of consecutive groups of ``sizes`` ``[G]``."""
    heads = torch.arange(num_heads, device=sizes.device)
    return torch.searchsorted(sizes.cumsum(0), heads, right=True).to(torch.int32)


def allocate(shares: Tensor, num_heads: int) -> Tensor:
    """The head map int32 ``[Hq]`` that assigns query heads in proportion to ``shares``."""
    return contiguous_map(largest_remainders(shares, num_heads), num_heads)


class KeyNormAllocation(nn.Module):
    """State of an allocation: the latest norms, those of the last window, and its length.

    The norms stay fp32 even if the module is converted to a 16-bit type, in which their differences
    would be rounding errors.

    Args:
        kind: one of the names in ``ALLOCATIONS``.
        window: steps between two allocations of the DGQA kinds.
    """

    def __init__(self, kind: str, num_heads: int, num_kv_heads: int, window: int = 300):
        super().__init__()
        if kind not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {kind!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.kind, self.num_heads, self.window = kind, num_heads, window
        self.register_buffer("norms", torch.zeros(num_kv_heads))
        self.register_buffer("last_norms", torch.zeros(num_kv_heads))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeyNormAllocation:
        """As in every module (``to``, ``bfloat16``, ``cuda``), except that the norms keep their
        type."""
        before = {name: getattr(self, name) for name in ("norms", "last_norms")}
        super()._apply(fn, recurse)
        for name, norms in before.items():
            moved = getattr(self, name)
            if moved.dtype != norms.dtype:
                setattr(self, name, norms.to(moved.device))
        return self

    @torch.no_grad()
    def observe(self, k: Tensor, head_map: Tensor) -> None:
        """Record the norms of a forward's keys; ``kdgqa`` also writes the map. Recording the same
        keys twice (activation checkpointing) changes nothing."""
        self.norms.copy_(key_norms(k))
        if self.kind == "kdgqa":
            head_map.copy_(allocate(self.norms - self.norms.min(), self.num_heads))

    @torch.no_grad()
    def step(self, head_map: Tensor) -> None:
        """Call after a training step. At the end of a window, ``dgqa`` writes the map."""
        self.steps += 1
        if self.kind == "kdgqa":
            return
        due, first = self.steps % self.window == 0, self.steps == self.window
        if self.kind == "dgqa-diff":
            shares, kept = (self.norms - self.last_norms).abs(), self.norms
        else:
            shares = kept = EMA_WEIGHT * self.norms + (1 - EMA_WEIGHT) * self.last_norms
        # The first window has no earlier norms to compare or to average with.
        shares, kept = (torch.where(first, self.norms, x) for x in (shares, kept))
        head_map.copy_(torch.where(due, allocate(shares, self.num_heads), head_map))
        self.last_norms.copy_(torch.where(due, kept, self.last_norms))

    def extra_repr(self) -> str:
        return f"{self.kind}, window={self.window}"
