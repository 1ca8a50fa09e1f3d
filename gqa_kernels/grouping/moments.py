"""Moments of attention inputs: running sums of them, and files that hold either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..reporting.files import write_atomically

FORMAT = "gqa-kernels moments 1"
SUMS_FORMAT = "gqa-kernels running sums 1"


@dataclass
class LayerStats:
    """Moments of one attention layer's input ``x [d]`` over the tokens that are not padding.

    Everything is fp64 on the CPU. In cross-attention ``x`` is what K and V are made of.

    Attributes:
        count: tokens.
        mean: ``[d]``, E[x].
        second_moment: ``[d, d]``, E[x x^T].
        position_count: ``[P]``, tokens at each position of a sequence.
        position_mean: ``[P, d]``, E[x] at each position, 0 where there was no token.
        query: the same of q's input in cross-attention, else None.
        halves: the same of the even and of the odd batches, where they were kept apart.
    """

    count: int
    mean: Tensor
    second_moment: Tensor
    position_count: Tensor
    position_mean: Tensor
    query: LayerStats | None = None
    halves: tuple[LayerStats, LayerStats] | None = field(default=None, repr=False)


class Sums:
    """Running sums of one input, in fp64 on the CPU; ``finish`` turns them into moments.

    Attributes:
        outer: ``[d, d]`` sum of x x^T.
        position_sum: ``[P, d]`` sum of x at each position.
        position_count: ``[P]`` tokens at each position.
    """

    NAMES = ("outer", "position_sum", "position_count")

    def __init__(self):
        self.outer = torch.zeros(0, 0, dtype=torch.float64)
        self.position_sum = torch.zeros(0, 0, dtype=torch.float64)
        self.position_count = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor, mask: Tensor, layer: int) -> None:
        """x: ``[B, S, d]``; mask: ``[B, S]``, True where a token is not padding.

        Products are summed in fp32 within the batch.
        """
        kept = torch.where(mask[..., None], x, 0).double().sum(0).cpu()
        if not kept.isfinite().all():
            raise ValueError(f"activations must be finite, got NaN or inf in layer {layer}")
        tokens = x[mask].float()  # [n, d]
        self.outer = _sum(self.outer, (tokens.T @ tokens).double().cpu())
        self.position_sum = _sum(self.position_sum, kept)
        self.position_count = _sum(self.position_count, mask.sum(0).double().cpu())

    def finish(self) -> LayerStats:
        count = int(self.position_count.sum())
        if not count:
            raise ValueError(
                "batches must hold at least one token that is not padding, got none (of a half, "
                "two batches are needed)"
            )
        return LayerStats(
            count,
            self.position_sum.sum(0) / count,
            self.outer / count,
            self.position_count,
            self.position_sum / self.position_count.clamp(min=1)[:, None],
        )


def combine(parts: Sequence[Sums]) -> Sums:
    """The sums over everything that the parts hold."""
    if len(parts) == 1:
        return parts[0]
    whole = Sums()
    for part in parts:
        for name in Sums.NAMES:
            setattr(whole, name, _sum(getattr(whole, name), getattr(part, name)))
    return whole


def save_stats(stats: Sequence[LayerStats], path: str | Path) -> Path:
    """Write what ``calibrate`` returned as one safetensors file, whole or not at all."""
    tensors = {}
    for layer, each in enumerate(stats):
        _put(tensors, str(layer), each)
    return _write(tensors, {"format": FORMAT, "layers": str(len(stats))}, path)


def load_stats(path: str | Path) -> list[LayerStats]:
    """Read what ``save_stats`` wrote.

    Raises:
        ValueError: no such file, or one that is truncated or something else.
    """
    tensors, metadata = _read(path, FORMAT)
    return [_get(tensors, str(layer)) for layer in range(int(metadata["layers"]))]


def save_sums(path: str | Path, sums: Sequence[dict[str, Sums]], batches: int) -> Path:
    """Write running sums after a number of batches."""
    tensors = {
        f"{part}/{name}/{field_}": getattr(each, field_)
        for part, named in enumerate(sums)
        for name, each in named.items()
        for field_ in Sums.NAMES
    }
    metadata = {"format": SUMS_FORMAT, "batches": str(batches), "parts": str(len(sums))}
    metadata["names"] = json.dumps(list(sums[0]))
    return _write(tensors, metadata, path)


def load_sums(
    path: str | Path, names: Sequence[str], parts: int
) -> tuple[list[dict[str, Sums]], int]:
    """Running sums, and the number of batches in them.

    Raises:
        ValueError: as ``load_stats``, or sums of other layers or halves.
    """
    tensors, metadata = _read(path, SUMS_FORMAT)
    held = json.loads(metadata["names"]), int(metadata["parts"])
    if held != (list(names), parts):
        raise ValueError(
            f"{path} must hold sums of {len(names)} attention inputs in {parts} parts, got "
            f"{len(held[0])} in {held[1]}"
        )
    sums = []
    for part in range(parts):
        sums.append({name: Sums() for name in names})
        for name, each in sums[-1].items():
            for field_ in Sums.NAMES:
                setattr(each, field_, tensors[f"{part}/{name}/{field_}"])
    return sums, int(metadata["batches"])


_FIELDS = ("mean", "second_moment", "position_count", "position_mean")


def _put(tensors: dict[str, Tensor], prefix: str, stats: LayerStats) -> None:
    for name in _FIELDS:
        tensors[f"{prefix}/{name}"] = getattr(stats, name).contiguous()
    if stats.query is not None:
        _put(tensors, f"{prefix}/query", stats.query)
    for half, each in enumerate(stats.halves or ()):
        _put(tensors, f"{prefix}/half{half}", each)


def _get(tensors: dict[str, Tensor], prefix: str) -> LayerStats:
    fields = {name: tensors[f"{prefix}/{name}"] for name in _FIELDS}
    stats = LayerStats(int(fields["position_count"].sum()), **fields)
    if f"{prefix}/query/mean" in tensors:
        stats.query = _get(tensors, f"{prefix}/query")
    if f"{prefix}/half0/mean" in tensors:
        stats.halves = (_get(tensors, f"{prefix}/half0"), _get(tensors, f"{prefix}/half1"))
    return stats


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> Path:
    from safetensors.torch import save

    return write_atomically(path, save(tensors, metadata))


def _read(path: str | Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
    if metadata.get("format") != expected:
        raise ValueError(f"{path} must hold {expected!r}, got {metadata.get('format')!r}")
    return tensors, metadata


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of tensors of which each dim may be shorter in one, as if it were zero there."""
    shape = [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)]
    out = a.new_zeros(shape)
    out[tuple(slice(n) for n in a.shape)] += a
    out[tuple(slice(n) for n in b.shape)] += b
    return out
