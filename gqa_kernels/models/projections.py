"""Projections of an attention module by head: separate or fused, ``nn.Linear`` or ``Conv1D``.

A fused projection computes q, k and v together. Checkpoints have two layouts of its outputs:
concatenated, ``[q heads | k heads | v heads]`` (GPT-2), and interleaved, ``[q | k | v]`` head by
head (GPT-NeoX). The interleaved layout can't hold fewer K heads than query heads. ``write``
concatenates, and stores the head counts in the module as ``asym_heads``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

FUSED_HEADS = "asym_heads"  # set on an attention module when its fused projection is written


class Heads(NamedTuple):
    """Head counts ``Hq``, ``Hk`` and ``Hv``."""

    query: int
    key: int
    value: int


@dataclass(frozen=True)
class Names:
    """Names of an attention module's projections.

    Attributes:
        query, key, value: the projections, if they are separate.
        fused: the projection, if there is only one.
        interleaved: layout of the fused projection in the family's own checkpoints.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str | None = None
    interleaved: bool = False


class Projection(NamedTuple):
    """One projection by head: weight ``[H, D, d]`` (output: ``[d, H, D]``), bias or None."""

    weight: Tensor
    bias: Tensor | None


def head_counts(module: nn.Module, names: Names, num_heads: int, head_dim: int) -> Heads:
    """The head counts of the projections.

    Raises:
        ValueError: a projection's outputs are not a whole number of heads, or q's are not
            ``num_heads`` heads.
    """
    if names.fused:
        heads = getattr(module, FUSED_HEADS, None) or Heads(num_heads, num_heads, num_heads)
        rows = len(_rows(getattr(module, names.fused))[0])
        if rows != sum(heads) * head_dim:
            raise ValueError(
                f"{names.fused} must have {sum(heads)} x {head_dim} outputs, got {rows}"
            )
        return Heads(*heads)
    counts = []
    for name in (names.query, names.key, names.value):
        rows = len(_rows(getattr(module, name))[0])
        if rows % head_dim:
            raise ValueError(f"{name} must have a multiple of {head_dim} outputs, got {rows}")
        counts.append(rows // head_dim)
    if counts[0] != num_heads:
        raise ValueError(f"{names.query} must have {num_heads} heads, got {counts[0]}")
    return Heads(*counts)


def read(module: nn.Module, names: Names, heads: Heads) -> list[Projection]:
    """q, k and v by head; views if the layout permits."""
    if not names.fused:
        return [
            _by_head(*_rows(getattr(module, name)), count)
            for name, count in zip((names.query, names.key, names.value), heads, strict=True)
        ]
    weight, bias = _rows(getattr(module, names.fused))
    if names.interleaved and not hasattr(module, FUSED_HEADS):
        weight = weight.unflatten(0, (heads.query, 3, -1))
        bias = None if bias is None else bias.unflatten(0, (heads.query, 3, -1))
        return [
            Projection(weight[:, part], None if bias is None else bias[:, part])
            for part in range(3)
        ]
    dim = len(weight) // sum(heads)
    sizes = [count * dim for count in heads]
    biases = [None] * 3 if bias is None else bias.split(sizes)
    return [
        _by_head(rows, part, count)
        for rows, part, count in zip(weight.split(sizes), biases, heads, strict=True)
    ]


def write(module: nn.Module, names: Names, parts: list[Projection]) -> None:
    """Replace q, k and v. The modules then have as many heads as the parts."""
    flat = [
        (part.weight.flatten(0, 1), None if part.bias is None else part.bias.flatten())
        for part in parts
    ]
    if not names.fused:
        for name, (weight, bias) in zip((names.query, names.key, names.value), flat, strict=True):
            _replace(getattr(module, name), weight, bias)
        return
    bias = None if flat[0][1] is None else torch.cat([bias for _, bias in flat])
    _replace(getattr(module, names.fused), torch.cat([weight for weight, _ in flat]), bias)
    mark(module, Heads(*(len(part.weight) for part in parts)))


def resize(module: nn.Module, output: nn.Module, names: Names, heads: Heads, head_dim: int) -> None:
    """Resize the projections to these head counts. Their values are undefined afterwards."""
    _resize(output, inputs=heads.query * head_dim)
    if names.fused:
        _resize(getattr(module, names.fused), outputs=sum(heads) * head_dim)
        mark(module, heads)
        return
    for name, count in zip((names.query, names.key, names.value), heads, strict=True):
        _resize(getattr(module, name), outputs=count * head_dim)


def mark(module: nn.Module, heads: Heads) -> None:
    """Record the head counts of a concatenated fused projection.

    transformers' GPT-2 splits its projection by ``split_size``.
    """
    setattr(module, FUSED_HEADS, heads)
    if hasattr(module, "split_size"):
        module.split_size = [count * module.head_dim for count in heads]


def read_output(output: nn.Module, num_heads: int) -> Projection:
    """The output projection as ``[d, Hq, Dv]`` and its bias ``[d]``."""
    weight, bias = _rows(output)
    return Projection(weight.unflatten(1, (num_heads, -1)), bias)


def write_output(output: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Replace the output projection by ``[d, Hq, Dv]`` and its bias ``[d]``."""
    _replace(output, weight.flatten(1), bias)


def _rows(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[outputs, inputs]`` and bias ``[outputs]``, detached."""
    weight = projection.weight.detach()
    bias = None if projection.bias is None else projection.bias.detach()
    return (weight.T if _is_conv1d(projection) else weight), bias


def _by_head(weight: Tensor, bias: Tensor | None, heads: int) -> Projection:
    return Projection(
        weight.unflatten(0, (heads, -1)), None if bias is None else bias.unflatten(0, (heads, -1))
    )


def _replace(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Copy new values ``[outputs, inputs]`` and ``[outputs]`` into a projection."""
    if _is_conv1d(projection):
        weight = weight.T
    old = projection.weight
    projection.weight = nn.Parameter(
        weight.to(old).clone(memory_format=torch.contiguous_format), old.requires_grad
    )
    if bias is not None:
        old = projection.bias
        projection.bias = nn.Parameter(bias.to(old).clone(), old.requires_grad)
    _set_features(projection)


def _resize(projection: nn.Module, inputs: int | None = None, outputs: int | None = None) -> None:
    """Change the number of inputs or of outputs."""
    shape = list(projection.weight.shape)
    places = (0, 1) if _is_conv1d(projection) else (1, 0)  # axes of inputs and outputs
    for place, features in zip(places, (inputs, outputs), strict=True):
        shape[place] = shape[place] if features is None else features
    if shape == list(projection.weight.shape):
        return
    projection.weight = nn.Parameter(projection.weight.new_empty(shape))
    if projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias.new_empty(shape[places[1]]))
    _set_features(projection)


def _set_features(projection: nn.Module) -> None:
    """Set the sizes that a projection's attributes report."""
    if _is_conv1d(projection):
        projection.nx, projection.nf = projection.weight.shape
    else:
        projection.out_features, projection.in_features = projection.weight.shape


def _is_conv1d(projection: nn.Module) -> bool:
    """transformers' ``Conv1D``: a linear layer with its weight transposed."""
    return hasattr(projection, "nf")
