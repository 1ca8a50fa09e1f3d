"""Bytes that attention must move, operations it must do, and the time that limits allow for both.

The one definition for every benchmark row. Bytes count each input once and the output once: a KV
head is counted once per sequence however many query heads read it, and not at all where no query
head does; keys that no query sees are not counted. Operations count two per multiply-add of both
matrix products over the visible (query, key) pairs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gqa_kernels import HeadMap


@dataclass(frozen=True)
class Work:
    """What one call must move and do.

    Attributes:
        bytes: read and written once each.
        flops: of both matrix products, two per multiply-add.
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Bound:
    """The least time that the limits allow for some work.

    Attributes:
        seconds: the larger of the two times.
        by: which of the limits it comes from, ``"memory"`` or ``"compute"``.
    """

    seconds: float
    by: str


def attention_work(
    head_map: HeadMap,
    batch: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    itemsize: int,
    *,
    value_head_dim: int | None = None,
    value_head_map: HeadMap | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: Sequence[int] | None = None,
    kv_itemsize: float | None = None,
    row_scale_bytes: int = 0,
    bias_per_head: bool = False,
) -> Work:
    """Work of one forward call; arguments as the attention functions take them.

    Args:
        itemsize: bytes of an element of q, k, v and out.
        kv_lengths: keys of each sequence; default ``kv_len`` for all.
        kv_itemsize: bytes of a stored number of K and V, where it is another (int4: 0.5).
        row_scale_bytes: of the scale of each row of K and V, where they are quantised.
        bias_per_head: an additive mask ``[1, Hq, q_len, kv_len]`` of ``itemsize`` is read too.
    """
    value_head_dim = value_head_dim or head_dim
    value_head_map = value_head_map or head_map
    left, right = window or (None, None)
    right = 0 if causal else right
    lengths = [kv_len] * batch if kv_lengths is None else list(kv_lengths)
    pairs = sum(visible_pairs(q_len, n, left, right) for n in lengths)
    keys = sum(visible_keys(q_len, n, left) for n in lengths)
    kv_itemsize = itemsize if kv_itemsize is None else kv_itemsize
    k_row = heads_read(head_map) * (head_dim * kv_itemsize + row_scale_bytes)
    v_row = heads_read(value_head_map) * (value_head_dim * kv_itemsize + row_scale_bytes)
    elements = batch * q_len * head_map.num_heads * (head_dim + value_head_dim)
    if bias_per_head:
        elements += head_map.num_heads * q_len * kv_len
    return Work(
        bytes=itemsize * elements + round(keys * (k_row + v_row)),
        flops=2 * (head_dim + value_head_dim) * head_map.num_heads * pairs,
    )


def append_work(
    head_map: HeadMap, tokens: int, head_dim: int, itemsize: int, kv_itemsize: float | None = None,
    row_scale_bytes: int = 0,
) -> Work:  # fmt: skip
    """Work of an append: new rows of K and V read once, stored rows and their scales written once.

    Args:
        tokens: new tokens of all sequences together.
        itemsize: bytes of an element of the new rows; the others as for :func:`attention_work`.
    """
    kv_itemsize = itemsize if kv_itemsize is None else kv_itemsize
    row = head_dim * (itemsize + kv_itemsize) + row_scale_bytes
    return Work(bytes=round(2 * tokens * head_map.num_kv_heads * row), flops=0)


def bound(work: Work, bytes_per_second: float, flops_per_second: float) -> Bound:
    """The least time for ``work`` at the given rates."""
    memory, compute = work.bytes / bytes_per_second, work.flops / flops_per_second
    return Bound(memory, "memory") if memory >= compute else Bound(compute, "compute")


def heads_read(head_map: HeadMap) -> int:
    """KV heads that some query head reads."""
    return len(set(head_map.entries))


def visible_pairs(q_len: int, kv_len: int, left: int | None, right: int | None) -> int:
    """(query, key) pairs of one head of one sequence that a mask leaves visible.

    Args:
        left, right: keys visible before and after a query's position, None for all. Query ``i``
            stands at position ``i + kv_len - q_len``.
    """
    if left is None and right is None:
        return q_len * kv_len
    offset = kv_len - q_len
    pairs = 0
    for i in range(q_len):
        first = 0 if left is None else max(0, i + offset - left)
        last = kv_len - 1 if right is None else min(kv_len - 1, i + offset + right)
        pairs += max(0, last - first + 1)
    return pairs


def visible_keys(q_len: int, kv_len: int, left: int | None) -> int:
    """Keys of a sequence that at least one query sees.

    The ranges of successive queries are one key apart, so their union is one range; it ends at the
    last key, where the last query stands.
    """
    if q_len == 0:
        return 0
    return kv_len if left is None else min(kv_len, q_len + left)
