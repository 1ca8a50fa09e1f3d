"""Merging attention over parts of the keys, and attention with a prefix that sequences share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .cache.base import KVCache
from .cache.tensors import Layout, check_layout
from .call.checks import HeadMapLike, heads_first
from .call.keywords import PartKeywords
from .decode import asym_gqa_decode
from .native.arguments import as_bool, check_tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, layout: Layout = "bhsd"
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    With weights ``exp(lse)`` the outputs are averaged and the LSEs added, in fp32 (FlashInfer,
    arXiv 2501.01005, section 2.2). A row of a part without a visible key has no weight: its output
    is ignored, even if it is NaN. Such a row has an LSE of -inf, or of +inf as FlashAttention-2
    returns it. Differentiable in all four.

    Args:
        out_a, out_b: ``[B, Hq, Sq, Dv]`` (``[B, Sq, Hq, Dv]`` for layout ``"bshd"``), or packed
            ``[total_q, Hq, Dv]``.
        lse_a, lse_b: natural-log LSEs ``[B, Hq, Sq]``, or packed ``[Hq, total_q]``.

    Returns:
        out in the type of ``out_a``, and the LSE, fp32.

    Examples:
        >>> import torch
        >>> from gqa_kernels import asym_gqa_attention, merge_attention_states
        >>> q, k, v = (torch.randn(1, heads, 8, 16) for heads in (3, 2, 2))
        >>> parts = [
        ...     asym_gqa_attention(q, k[:, :, part], v[:, :, part], [0, 0, 1], return_lse=True)
        ...     for part in (slice(0, 5), slice(5, 8))
        ... ]
        >>> out, lse = merge_attention_states(*parts[0], *parts[1])
        >>> torch.allclose(out, asym_gqa_attention(q, k, v, [0, 0, 1]), atol=1e-5)
        True
    """
    _check_states({"out_a": out_a, "out_b": out_b}, {"lse_a": lse_a, "lse_b": lse_b}, layout)
    # FlashAttention-2 marks a row that sees no key by +inf.
    lse_a, lse_b = (lse.masked_fill(lse == math.inf, -math.inf) for lse in (lse_a, lse_b))
    highest = torch.maximum(lse_a, lse_b)
    shift = highest.masked_fill(highest == -math.inf, 0).detach()
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    divisor = total.masked_fill(total == 0, 1)
    weighted_a, weighted_b = (
        over_heads_and_tokens(weight / divisor, part, layout)
        * part.masked_fill(over_heads_and_tokens(lse == -math.inf, part, layout), 0)
        for weight, part, lse in ((weight_a, out_a, lse_a), (weight_b, out_b, lse_b))
    )
    lse = (shift + torch.log(divisor)).masked_fill(total == 0, -math.inf)
    return (weighted_a + weighted_b).to(out_a.dtype), lse


def _check_states(outs: dict[str, Tensor], lses: dict[str, Tensor], layout: Layout) -> None:
    """Types, devices and shapes of two states, each pair by name."""
    check_layout(layout)
    for name, x in (outs | lses).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point or x.dtype.itemsize == 1 or x.layout != torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor of fp16, bf16, fp32 or fp64, got {x.dtype} "
                f"({x.layout})"
            )
    for pair in (outs, lses):
        (first, x), (second, y) = pair.items()
        if y.shape != x.shape:
            raise ValueError(
                f"{second} must have {first}'s shape {tuple(x.shape)}, got {tuple(y.shape)}"
            )
        if x.device != outs["out_a"].device or y.device != x.device:
            raise ValueError(
                f"{first} and {second} must be on the device of out_a "
                f"({outs['out_a'].device}), got {x.device} and {y.device}"
            )
    out, lse = outs["out_a"], lses["lse_a"]
    if out.dim() not in (3, 4) or lse.dim() != out.dim() - 1:
        raise ValueError(
            "out_a must have 4 dimensions and lse_a 3, or 3 and 2 if packed, got shapes "
            f"{tuple(out.shape)} and {tuple(lse.shape)}"
        )


@overload
def shared_prefix_attention(
    q: Tensor, prefix: KVCache, suffix: KVCache, head_map: HeadMapLike, *, layout: Layout = "bhsd",
    return_lse: Literal[False] = False,
    **keywords: Unpack[PartKeywords],
) -> Tensor: ...  # fmt: skip


@overload
def shared_prefix_attention(
    q: Tensor, prefix: KVCache, suffix: KVCache, head_map: HeadMapLike, *, layout: Layout = "bhsd",
    return_lse: Literal[True],
    **keywords: Unpack[PartKeywords],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def shared_prefix_attention(
    q: Tensor, prefix: KVCache, suffix: KVCache, head_map: HeadMapLike, *, layout: Layout = "bhsd",
    return_lse: bool,
    **keywords: Unpack[PartKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def shared_prefix_attention(
    q: Tensor,
    prefix: KVCache,
    suffix: KVCache,
    head_map: HeadMapLike,
    *,
    value_head_map: HeadMapLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of sequences that begin with one common prefix (cascade attention).

    The prefix is read once for all of them: its keys meet the queries of every sequence as the
    rows of one tile. The states over prefix and suffix are then merged.

    Args:
        q: ``[B, Hq, Sq, D]`` (``[B, Sq, Hq, D]`` for layout ``"bshd"``), the last tokens of each
            sequence, all of them in its suffix.
        prefix: a cache of batch 1.
        suffix: a cache of batch B: what follows the prefix.
        head_map, value_head_map, scale, softcap, sinks, layout, return_lse, backend: as for
            :func:`gqa_kernels.asym_gqa_decode`. Windows and ALiBi depend on distances across both
            parts and are not offered.

    Returns:
        as :func:`gqa_kernels.asym_gqa_decode`.

    Examples:
        >>> import torch
        >>> from gqa_kernels import DenseKVCache, shared_prefix_attention
        >>> prefix = DenseKVCache.empty(1, 2, 64, 16, dtype=torch.float32)  # of all sequences
        >>> prefix.append(*torch.randn(2, 1, 2, 40, 16))
        >>> suffix = DenseKVCache.empty(4, 2, 64, 16, dtype=torch.float32)
        >>> suffix.append(*torch.randn(2, 4, 2, 5, 16))
        >>> shared_prefix_attention(torch.randn(4, 3, 1, 16), prefix, suffix, [0, 0, 1]).shape
        torch.Size([4, 3, 1, 16])
    """
    return_lse = as_bool("return_lse", return_lse)
    if sinks is not None:
        if not isinstance(sinks, Tensor):
            raise TypeError(f"sinks must be a torch.Tensor or None, got {type(sinks).__name__}")
        check_tensors(sinks=sinks, q=q)
        if sinks.device != q.device:
            raise ValueError(f"sinks.device must equal q.device ({q.device}), got {sinks.device}")
    for name, cache in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(cache, KVCache):
            raise TypeError(
                f"{name} must be a DenseKVCache or PagedKVCache, got {type(cache).__name__}"
            )
    if prefix.lengths.shape[0] != 1:
        raise ValueError(f"prefix must hold 1 sequence, got {prefix.lengths.shape[0]}")
    q_heads_first = heads_first("q", q, layout, packed=False)
    tokens = q_heads_first.transpose(1, 2)  # [B, Sq, Hq, D]
    batch, q_len, heads, _ = tokens.shape
    out_a, lse_a = asym_gqa_decode(
        tokens.flatten(0, 1)[None], prefix, head_map, causal=False, layout="bshd",
        value_head_map=value_head_map, scale=scale, softcap=softcap, return_lse=True,
        backend=backend,
    )  # fmt: skip
    out_a = out_a.view(batch, q_len, heads, out_a.shape[-1])
    out_a = out_a if layout == "bshd" else out_a.transpose(1, 2)
    lse_a = lse_a.view(heads, batch, q_len).transpose(0, 1)
    out_b, lse_b = asym_gqa_decode(
        q, suffix, head_map, layout=layout, value_head_map=value_head_map, scale=scale,
        softcap=softcap, return_lse=True, backend=backend,
    )  # fmt: skip
    out, lse = merge_attention_states(out_a, lse_a, out_b, lse_b, layout=layout)
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks, layout=layout)
    return (out, lse) if return_lse else out


def merge_sinks(
    out: Tensor, lse: Tensor, sinks: Tensor, *, layout: Layout = "bhsd"
) -> tuple[Tensor, Tensor]:
    """Attention with sinks ``[Hq]``, from attention over all keys without them.

    A sink is a key with a value of zero: merged last, it counts once, for queries that see a key.
    """
    heads = lse.shape[-2]
    if sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    sink = sinks.to(lse.dtype)[:, None].expand_as(lse).masked_fill(lse == -math.inf, -math.inf)
    return merge_attention_states(out, lse, torch.zeros_like(out), sink, layout=layout)


def over_heads_and_tokens(weight: Tensor, out: Tensor, layout: Layout) -> Tensor:
    """Weights ``[B, Hq, Sq]`` or ``[Hq, total]`` in the dims of the output, the last one 1."""
    if weight.dim() == 2:
        weight = weight.transpose(0, 1)
    elif layout == "bshd":
        weight = weight.transpose(1, 2)
    if weight.shape != out.shape[:-1]:
        raise ValueError(
            f"lse must fit an output of shape {tuple(out.shape)} in layout {layout!r}, "
            f"got {tuple(weight.shape)} for its leading dims"
        )
    return weight[..., None]
