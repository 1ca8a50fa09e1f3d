"""Where K, V and their scales lie in vLLM's KV memory.

vLLM hands a layer ``[blocks, heads, block_size, content]`` in any memory order. The content of a
cell is K and V of one head and token, side by side, and behind them the scales of formats that have
one per token and head::

    K of the heads | V of the heads | scales of K | scales of V | zeros of K | zeros of V

Where K and V have different counts of heads, vLLM sees one head, and a cell holds all heads of a
token. Needs no vLLM, only its names of the formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.formats import FORMAT_OF_NAME, Format

# vLLM's names of formats with one scale per token and head.
PER_TOKEN_HEAD = {
    "int8_per_token_head": FORMAT_OF_NAME["int8"],
    "int4_per_token_head": FORMAT_OF_NAME["int4"],
    "fp8_per_token_head": FORMAT_OF_NAME["fp8_e4m3"],
}
SCALE_BYTES = 4  # fp32


def slot_bytes(
    kv_cache_dtype: str, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int]
) -> int:
    """Bytes of a cell.

    Args:
        kv_cache_dtype: vLLM's name of the format.
        dtype: of the memory, if the format has no scales in it.
        heads, dims: heads of K and V in a cell, and their head dims.

    Raises:
        ValueError: scales that would not begin at a multiple of 4 bytes.
    """
    format = PER_TOKEN_HEAD.get(kv_cache_dtype)
    if format is None:
        return sum(h * d for h, d in zip(heads, dims, strict=True)) * dtype.itemsize
    data = sum(h * d // format.per_byte for h, d in zip(heads, dims, strict=True))
    if data % SCALE_BYTES or any(d % format.per_byte for d in dims):
        raise ValueError(
            f"keys and values of a token must fill whole {SCALE_BYTES}-byte words with "
            f"kv_cache_dtype {kv_cache_dtype!r}, got {data} bytes of head dims {dims}"
        )
    return data + sum(heads) * SCALE_BYTES * (1 + _has_zeros(format))


@dataclass(frozen=True)
class Pages:
    """How a layer's cells are laid out.

    Attributes:
        heads: heads of K and V in a block. A rank of tensor parallelism may use fewer.
        dims: head dims of K and V.
        storage: type of the stored numbers, or None: that of vLLM's tensor.
        format: a format with scales in the cell, or None.
    """

    heads: tuple[int, int]
    dims: tuple[int, int]
    storage: torch.dtype | None = None
    format: Format | None = None

    def split(
        self, kv_cache: Tensor, used: tuple[int, int]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """K ``[blocks, Hk, block_size, D]``, V likewise, and the scales, as views.

        Args:
            kv_cache: vLLM's tensor of the layer.
            used: heads of K and V in the layer, which are the first ones of the block.

        Returns:
            K, V, and arguments of :class:`gqa_kernels.PagedKVCache`: scales and zeros, fp32
            ``[blocks, H, block_size]``, empty if the cell has none.
        """
        together = self.heads[0] == self.heads[1]  # K and V of a head side by side
        heads = (1, 1) if together else self.heads
        if self.storage is not None and kv_cache.dtype != self.storage:
            kv_cache = kv_cache.view(self.storage)
        per_byte = 1 if self.format is None else self.format.per_byte
        widths = [h * d // per_byte for h, d in zip(heads, self.dims, strict=True)]
        sides = kv_cache[..., : sum(widths)].split(widths, dim=-1)
        k, v = (_heads(x, h)[:, :n] for x, h, n in zip(sides, heads, used, strict=True))
        if self.format is None:
            return k, v, {}
        behind = kv_cache[..., sum(widths) :].view(torch.float32)
        names = ["k_scale", "v_scale"]
        if _has_zeros(self.format):
            names += ["k_zero", "v_zero"]
        counts = list(heads) * (len(names) // 2)
        rows = behind[..., : sum(counts)].split(counts, dim=-1)
        numbers = list(used) * (len(names) // 2)
        scales = {
            name: _heads(x, h)[:, :n, :, 0]
            for name, x, h, n in zip(names, rows, counts, numbers, strict=True)
        }
        return k, v, scales


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[blocks, cells, block_size, heads * D]`` as ``[blocks, cells * heads, block_size, D]``;
    one of the two counts is 1."""
    x = x.unflatten(-1, (heads, -1))
    return x.squeeze(3) if heads == 1 else x.squeeze(1).transpose(1, 2)


def _has_zeros(format: Format) -> bool:
    """Whether a row has a zero besides its scale: four bits are too few for symmetric ranges."""
    return format.per_byte > 1
