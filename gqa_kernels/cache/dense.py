"""DenseKVCache: one run of slots per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.arguments import as_device, check_tensors
from .base import KVCache, checked_sizes, empty_scales, empty_storage, formats_of
from .tensors import Layout, check_layout
from .view import KVView


class DenseKVCache(KVCache):
    """Keys and values in ``[B_cache, H, capacity, D]`` memory, which may belong to an engine.

    Args:
        k: ``[B_cache, Hk, capacity, D]``, or ``[B_cache, capacity, Hk, D]`` for layout ``"bshd"``;
            any strides with a contiguous last dim. The dtype says the format: the query's own, fp8
            (e4m3fn, e5m2), int8, or uint8 for int4 with ``D / 2`` bytes
            (:mod:`gqa_kernels.cache.formats`).
        v: ``[B_cache, Hv, capacity, Dv]`` in k's format, or int4 with int8 keys. K and V may
            be views of one tensor.
        lengths: ``[B]`` integers, or ``[B, Hk]`` with a budget per head: keys there are.
        batch_index: ``[B]`` integers, the row of each sequence in k and v; default its own number.
        begin: ``[B]`` integers, slot of a sequence's first key (left padding); default 0.
        k_scale, v_scale, k_zero, v_zero: of a quantised cache: one number, ``[H]`` per head,
            ``[B_cache, H]`` per row of k and head, or fp32 ``[B_cache, H, capacity]`` per token,
            which an append then computes and writes.
        k_channels: fp32 ``[Hk, D]``, positive: store keys divided by these, and multiply queries by
            them: the same attention, with less error where some columns of K are larger than the
            rest. With ``k_scale=1.0`` they are the scales of int8 keys per channel.
        hadamard: store keys rotated by a Hadamard matrix, and rotate queries likewise: the same
            attention, with much less error where keys have 4 bits. Head dim D must be even.

    Examples:
        >>> from gqa_kernels import DenseKVCache
        >>> cache = DenseKVCache.empty(2, num_kv_heads=3, capacity=9, head_dim=64, format="int8")
        >>> cache.k.shape, cache.lengths.tolist()
        (torch.Size([2, 3, 9, 64]), [0, 0])
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        *,
        batch_index: Tensor | None = None,
        begin: Tensor | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        k_zero: Tensor | float | None = None,
        v_zero: Tensor | float | None = None,
        k_channels: Tensor | None = None,
        hadamard: bool = False,
        layout: Layout = "bhsd",
    ):
        check_layout(layout)
        check_tensors(k=k, v=v, lengths=lengths)
        if batch_index is not None:
            check_tensors(batch_index=batch_index)
            if batch_index.dim() != 1:
                raise ValueError(
                    f"batch_index must have 1 dimension, got {batch_index.dim()} "
                    f"(shape {tuple(batch_index.shape)})"
                )
        if layout == "bshd" and min(k.dim(), v.dim()) < 3:
            raise ValueError(f"k and v must have 4 dimensions, got {k.dim()} and {v.dim()}")
        if layout == "bshd":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.k, self.v, self.lengths = k, v, lengths
        self.batch_index, self.begin = batch_index, begin
        self.k_scale, self.v_scale, self.k_zero, self.v_zero = k_scale, v_scale, k_zero, v_zero
        self.view()
        self._transform_keys(k_channels, hadamard)

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        format: str | None = None,
        zeros: bool = False,
        k_channels: Tensor | None = None,
        hadamard: bool = False,
        layout: Layout = "bhsd",
    ) -> DenseKVCache:
        """An empty cache in memory of its own.

        Args:
            format: None stores ``dtype``; ``"fp8_e4m3"``, ``"fp8_e5m2"``, ``"int8"`` or ``"int4"``
                quantises with a scale per token and head; ``"k8v4"`` keys as int8 and values
                as int4.
            zeros: keep a zero per token and head too (integers).
            k_channels, hadamard: as the constructor has them.
            layout: memory order.
        """
        check_layout(layout)
        device = as_device(device)
        batch, num_kv_heads, capacity, head_dim, num_value_heads, value_head_dim = checked_sizes(
            batch=batch, num_kv_heads=num_kv_heads, capacity=capacity, head_dim=head_dim,
            num_value_heads=num_kv_heads if num_value_heads is None else num_value_heads,
            value_head_dim=head_dim if value_head_dim is None else value_head_dim,
        )  # fmt: skip
        k_format, v_format = formats_of(format)
        where = (dtype, device, layout == "bshd")
        k = empty_storage(batch, num_kv_heads, capacity, head_dim, k_format, *where)
        v = empty_storage(batch, num_value_heads, capacity, value_head_dim, v_format, *where)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(
            k, v, lengths, k_channels=k_channels, hadamard=hadamard,
            **empty_scales(k, v, format, zeros),
        )  # fmt: skip

    def _parts(self) -> tuple[Tensor | float | None, ...]:
        return (
            self.k, self.v, self.lengths, self.batch_index, self.begin, self.k_scale, self.v_scale,
            self.k_zero, self.v_zero,
        )  # fmt: skip

    def _create_view(self) -> KVView:
        table = None if self.batch_index is None else self.batch_index[:, None]
        return KVView.create(
            self.k, self.v, self.lengths, page_table=table, kv_begin=self.begin, **self.scales,
            check_values=False,
        )  # fmt: skip
