"""Moments of attention inputs: running sums of them, and files that hold either."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.fingerprint import Fingerprint, check_same
from ..reporting.files import write_atomically

FORMAT = "gqa-kernels moments 2"
SUMS_FORMAT = "gqa-kernels running sums 2"
METADATA = "gqa-kernels"


@dataclass
class LayerStats:
    """Moments of one attention layer's input ``x [d]`` over the tokens that are not padding.

    Everything is fp64 on the CPU. In cross-attention ``x`` is the input of K and V.

    Attributes:
        count: tokens.
        mean: ``[d]``, E[x].
        second_moment: ``[d, d]``, E[x x^T].
        position_count: ``[P]``, tokens at each position of a sequence.
        position_mean: ``[P, d]``, E[x] at each position, 0 if there was no token.
        query: the same of q's input in cross-attention, else None.
        halves: the same of the even and of the odd batches, if they were kept apart.
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


def save_stats(
    stats: Sequence[LayerStats], path: str | Path, made_from: Fingerprint | None = None
) -> Path:
    """Write what ``calibrate`` returned as one safetensors file, whole or not at all.

    Args:
        made_from: ``fingerprint(model, batches)``, so that ``load_stats`` can check it.
    """
    tensors = {}
    for layer, each in enumerate(stats):
        _put(tensors, str(layer), each)
    return _write(tensors, {"format": FORMAT, "layers": len(stats)}, made_from, path)


def load_stats(path: str | Path, made_from: Fingerprint | None = None) -> list[LayerStats]:
    """Read what ``save_stats`` wrote.

    Args:
        made_from: refuse moments of another model, or of other data if it says which.

    Raises:
        ValueError: no such file, one that is truncated or something else, or moments that were made
            from something else.
    """
    tensors, metadata, stored = _read(path, FORMAT)
    if made_from is not None:
        check_same(path, stored, made_from)
    with _complete(path):
        return [_get(tensors, str(layer)) for layer in range(metadata["layers"])]


def save_sums(
    path: str | Path, sums: Sequence[dict[str, Sums]], batches: int, made_from: Fingerprint
) -> Path:
    """Write running sums after a number of batches."""
    tensors = {
        f"{part}/{name}/{field_}": getattr(each, field_)
        for part, named in enumerate(sums)
        for name, each in named.items()
        for field_ in Sums.NAMES
    }
    metadata = {"format": SUMS_FORMAT, "batches": batches}
    return _write(tensors, metadata, made_from, path)


def load_sums(
    path: str | Path, names: Sequence[str], parts: int, made_from: Fingerprint
) -> tuple[list[dict[str, Sums]], int, Fingerprint]:
    """Running sums, the number of batches in them, and all that they were made from.

    Args:
        names: of the attention inputs.
        parts: 2 if the moments of every second batch are kept apart, else 1.
        made_from: the model and the options of this run.

    Raises:
        ValueError: as ``load_stats``.
    """
    tensors, metadata, stored = _read(path, SUMS_FORMAT)
    check_same(path, stored, made_from)
    sums = [{name: Sums() for name in names} for _ in range(parts)]
    with _complete(path):
        for part, named in enumerate(sums):
            for name, each in named.items():
                for field_ in Sums.NAMES:
                    setattr(each, field_, tensors[f"{part}/{name}/{field_}"])
        return sums, metadata["batches"], stored or {}


def made_from(path: str | Path) -> Fingerprint:
    """What moments were made from; empty if unknown.

    Raises:
        ValueError: as ``load_stats``.
    """
    return _read(path, FORMAT)[2] or {}


def batches_kept(path: str | Path) -> int:
    """The number of batches in running sums."""
    return _read(path, SUMS_FORMAT)[1]["batches"]


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


def _write(
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    made_from: Fingerprint | None,
    path: str | Path,
) -> Path:
    from safetensors.torch import save

    # One field: safetensors writes several in random order, and equal files should be equal.
    text = json.dumps({**metadata, "made from": made_from}, sort_keys=True)
    return write_atomically(path, save(tensors, {METADATA: text}))


def _read(
    path: str | Path, expected: str
) -> tuple[dict[str, Tensor], dict[str, Any], Fingerprint | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
    with _complete(path):
        metadata = json.loads(text)
        if metadata.get("format") != expected:
            raise ValueError(f"{path} must hold {expected!r}, got {metadata.get('format')!r}")
        return tensors, metadata, metadata["made from"]


@contextmanager
def _complete(path: str | Path) -> Iterator[None]:
    """Turn what a file of other content raises into ValueError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be complete: {error!r}") from error


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of tensors of which each dim may be shorter in one, as if it were zero there."""
    shape = [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)]
    out = a.new_zeros(shape)
    out[tuple(slice(n) for n in a.shape)] += a
    out[tuple(slice(n) for n in b.shape)] += b
    return out
