"""One kernel launch as a value, and the kernels' NamedTuples made from tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ..configs import Tile, padded_dim
from ..kernels import kv
from ..kernels.arguments import Dims, Mask, Pages, PerHead, Rows, Stored

Argument = Tensor | tuple | int | float | bool | None


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton's ``kernel[grid](...)`` takes."""

    kernel: object
    grid: int
    arguments: dict[str, Argument]
    num_warps: int
    num_stages: int

    @classmethod
    def of(
        cls,
        kernel: object,
        grid: int,
        arguments: dict[str, Argument],
        num_warps: int,
        num_stages: int,
    ) -> Launch:
        """A launch with those of the arguments that the kernel takes."""
        taken = {name: arguments[name] for name in kernel.arg_names}
        return cls(kernel, grid, taken, num_warps, num_stages)

    def run(self) -> None:
        self.kernel[(self.grid,)](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
        )


# Types of quantised storage, as kernels name them. Kernels read fp8 and int4 as bytes.
FORMATS = {
    torch.float8_e4m3fn: kv.FP8_E4M3,
    torch.float8_e5m2: kv.FP8_E5M2,
    torch.int8: kv.INT8,
    torch.uint8: kv.INT4,
}


def rows_of(tensor: Tensor | None, packed: bool = False) -> Rows | None:
    """``[B, H, N, ...]`` for kernels. ``packed``: offsets say where a sequence begins, not B."""
    if tensor is None:
        return None
    stride_b, stride_h, stride_n = tensor.stride()[:3]
    return Rows(tensor, 0 if packed else stride_b, stride_h, stride_n)


def stored(tensor: Tensor, scale: Tensor | None, zero: Tensor | None) -> Stored:
    """K or V for kernels: ``[B, H, N, D]`` or pages, with the scales and zeros of its rows."""
    format = FORMATS.get(tensor.dtype, kv.PLAIN)
    if format in (kv.FP8_E4M3, kv.FP8_E5M2):
        tensor = tensor.view(torch.uint8)
    return Stored(rows_of(tensor), rows_of(scale), rows_of(zero), format)


def per_head(tensor: Tensor | None) -> PerHead | None:
    """``[B, H]`` for kernels."""
    return None if tensor is None else PerHead(tensor, *tensor.stride())


def mask_of(tensor: Tensor | None) -> Mask | None:
    """An attention mask for kernels, which read booleans as bytes."""
    if tensor is None:
        return None
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return Mask(tensor, *tensor.stride())


def pages_of(page_table: Tensor | None, page_size: int) -> Pages | None:
    """A page table for kernels."""
    if page_table is None:
        return None
    return Pages(page_table, *page_table.stride(), tl.constexpr(page_size))


def dims_of(head_dim: int, value_head_dim: int, tile: Tile | None = None) -> Dims:
    """The head dims for kernels, and the columns of a tile: all of them, without a ``tile``."""
    columns = [padded_dim(dim) for dim in (head_dim, value_head_dim)]
    if tile is not None:
        columns = [min(columns[0], tile.d_columns), min(columns[1], tile.dv_columns)]
    dims = (head_dim, value_head_dim, *columns)
    return Dims(*map(tl.constexpr, dims))
