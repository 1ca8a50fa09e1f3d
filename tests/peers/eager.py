"""Attention over given scores' bias and visibility; each peer's meaning is made of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.oracle import hold


def attention(
    q: Tensor, k: Tensor, v: Tensor, head_map: list[int], visible: Tensor, *, scale: float,
    softcap: float = 0.0, bias: Tensor | None = None, sinks: Tensor | None = None,
    products: torch.dtype = torch.float64, scale_queries: bool = False, shift: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out ``[B, Hq, Sq, Dv]`` and LSE, with K and V expanded.

    Args:
        q, k, v: ``[B, H, S, D]``.
        visible: boolean, broadcastable to ``[B, Hq, Sq, Sk]``.
        bias: added to the scores, likewise.
        products, scale_queries, shift: type of the products, and equivalent forms.
    """
    wide = torch.float64 if products == torch.float64 else torch.float32
    q, k = (x.to(products).roll(shift, -1) for x in (q, k[:, head_map]))
    if scale_queries:
        s = ((q * scale) @ k.transpose(-1, -2)).to(wide)
    else:
        s = (q @ k.transpose(-1, -2)).to(wide) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(wide)
    s = s.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sees = visible.expand(s.shape).any(-1, keepdim=True)
        sink = sinks.to(wide)[:, None, None].expand(*s.shape[:3], 1).masked_fill(~sees, -torch.inf)
        s = torch.cat([s, sink], -1)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()[..., : k.shape[2]]
    out = p.to(products) @ v[:, head_map].to(products)
    return out, lse


def check(
    out: Tensor, lse: Tensor | None, define: Callable[..., tuple[Tensor, Tensor]], dim: int
) -> None:
    """Hold results to the tolerance rule.

    Args:
        define: the peer's meaning in a precision; takes the last arguments of :func:`attention`.
        dim: head dim, which limits the forms.
    """
    exact_out, exact_lse = define()

    def forms(which: int, products: torch.dtype) -> Callable[[int], list[Tensor]]:
        return lambda most: [
            define(products=products, scale_queries=scaled, shift=shift)[which]
            for shift in range(min(most, dim))
            for scaled in (False, True)
        ]

    hold("out", out, exact_out, forms(0, out.dtype))
    if lse is not None:
        hold("lse", lse, exact_lse, forms(1, torch.float32))


def missing(name: str, value: object, why: str) -> NotImplementedError:
    """What a shim raises for an argument that our functions can't express."""
    return NotImplementedError(f"{name}={value!r}: {why}")
