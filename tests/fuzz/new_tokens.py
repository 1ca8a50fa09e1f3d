"""New tokens of an append: drawn, rotated, and looked for in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_kernels.testing import assert_close

from .caches import Place
from .draw import Draw
from .formats import largest_step, row_scale, stored, values


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rows ``[..., D]`` with their first R columns rotated, for tables ``[..., R / 2]``."""
    width = 2 * cos.shape[-1]
    if interleaved:
        a, b = x[..., 0:width:2], x[..., 1:width:2]
    else:
        a, b = x[..., : width // 2], x[..., width // 2 : width]
    first, second = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([first, second], -1).flatten(-2)
    if not interleaved:
        turned = torch.cat([first, second], -1)
    return torch.cat([turned, x[..., width:]], -1)


@dataclass
class New:
    """New tokens of a call: ``k[b] [Hk, n, D]``, ``v[b]``, and their rotary tables if any."""

    k: list[Tensor]
    v: list[Tensor]
    counts: list[int]
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False

    def turn(self, x: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``[H, n, D]`` of tokens at ``positions [H, n]`` rotated, computed in ``dtype``."""
        if self.cos is None:
            return x.to(dtype)
        position = positions.clamp(max=self.cos.shape[0] - 1)
        tables = (table.to(dtype)[position] for table in (self.cos, self.sin))
        return rotated(x.to(dtype), *tables, self.interleaved)


def check_append(place: Place, new: New, value_heads: list[int]) -> None:
    """The new tokens lie in their slots, in the cache's format."""
    for b, count in enumerate(new.counts):
        for side, rows in (("k", new.k[b]), ("v", new.v[b])):
            for head in range(rows.shape[0]):
                by = head if side == "k" else value_heads[head]
                first = int(place.lengths[b, by])
                page, slot = place.slots(b, by, first, first + count)
                if count:
                    _check_rows(place, new, side, head, rows[head], page, slot, first)


def _check_rows(place: Place, new: New, side, head, rows, page, slot, first) -> None:
    turned = side == "k" and new.cos is not None
    positions = torch.arange(first, first + len(rows))
    exact = new.turn(rows, positions, torch.float64) if side == "k" else rows.double()
    memory = {"k": place.k, "v": place.v}[side][page, head, slot]
    what = f"appended {side} of head {head}"
    if place.format is None:
        if not turned:
            assert torch.equal(memory, rows), f"{what}: other bits"
        else:
            eager = new.turn(rows, positions, torch.float32).to(rows.dtype)
            assert_close(what, memory, exact, [eager])
        return
    scale, zero = place.row_scales(side, head, page, slot)
    own = f"{side}_scale" in place.scales and torch.is_tensor(place.scales[f"{side}_scale"])
    own = own and place.scales[f"{side}_scale"].dim() == 3
    if own:
        expected_scale, expected_zero = row_scale(exact.float(), place.format, zero is not None)
        # A rotated row is rounded to its own type before its scale is computed.
        largest = exact.abs().amax(-1).float() * torch.finfo(rows.dtype).eps / place.format.largest
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5 if turned else 0,
                                   atol=float(largest.max()) if turned else 0)  # fmt: skip
        if zero is not None and not turned:
            assert torch.equal(zero, expected_zero), f"{what}: other zeros"
    if not turned:
        expected = stored(rows, place.format, scale, zero)
        same = torch.equal(memory.view(torch.uint8), expected.view(torch.uint8))
        assert same, f"{what}: other stored numbers"
    elif own:
        error = (values(memory, place.format, scale, zero) - exact).abs()
        rounding = exact.abs() * torch.finfo(rows.dtype).eps
        allowed = largest_step(exact, place.format, scale, zero) * 1.01 + rounding + 1e-6
        assert (error <= allowed).all(), f"{what}: error {float((error - allowed).max()):.2e}"


def draw_new(draw: Draw, place: Place, counts: list[int], dtype: torch.dtype, rotary: bool) -> New:
    def tokens(heads: int, dim: int) -> list[Tensor]:
        return [draw.normal(heads, n, dim, dtype=dtype, size=2.0) for n in counts]

    per_byte = 1 if place.format is None else place.format.per_byte
    dims = [x.shape[3] * per_byte for x in (place.k, place.v)]
    new = New(tokens(place.k.shape[1], dims[0]), tokens(place.v.shape[1], dims[1]), counts)
    if rotary and dims[0] >= 2:
        half = draw.integer(1, dims[0] // 2)
        positions = int(place.lengths.max()) + max(counts, default=0) + 1
        angle = draw.normal(positions, half, size=3.0)
        table = draw.pick(torch.float32, dtype)
        new.cos, new.sin = (draw.place(x.to(table)) for x in (angle.cos(), angle.sin()))
        if draw.chance(0.5):  # rows of a table that is wider than what is used
            new.cos, new.sin = new.cos.contiguous(), new.sin.contiguous()
        new.interleaved = draw.chance(0.5)
    return new
