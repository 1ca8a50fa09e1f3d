"""Figures of maps, curves and training. Needs matplotlib (the extra ``plots``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..head_map import HeadMap

SIDE_COLOURS = {"k": "tab:blue", "v": "tab:orange", "shared": "tab:green"}


def maps(pairs: Sequence[tuple[HeadMap, HeadMap]], path: str | Path) -> Path:
    """The KV head that each query head reads, by layer, for K and for V; one cell per query
    head."""
    figure, axes = _figure(1, 2, (10, 1.5 + 0.25 * len(pairs)))
    for axis, side, name in zip(axes[0], (0, 1), "KV", strict=True):
        cells = np.array([pair[side].entries for pair in pairs])
        axis.imshow(cells % 20, cmap="tab20", vmin=0, vmax=19, aspect="auto")
        for layer, row in enumerate(cells):
            for head, entry in enumerate(row):
                axis.text(head, layer, entry, ha="center", va="center", fontsize=7)
        axis.set_xlabel("query head")
        axis.set_ylabel("layer")
        axis.set_title(f"{name} head that a query head reads")
    return _save(figure, path)


def curves(layers: Sequence[Mapping[str, Mapping[int, float]]], path: str | Path) -> Path:
    """Search objective by number of heads: a thin line per layer, and a thick line for their
    mean."""
    figure, axes = _figure(1, 1, (6, 4))
    axis = axes[0][0]
    for side in layers[0]:
        heads = sorted(layers[0][side])
        costs = np.array([[layer[side][g] for g in heads] for layer in layers])
        for row in costs:
            axis.plot(heads, row, color=SIDE_COLOURS[side], alpha=0.2, linewidth=0.8)
        name = side.upper() if side in "kv" else "K and V"
        axis.plot(heads, costs.mean(0), color=SIDE_COLOURS[side], marker="o", label=name)
    axis.set_xlabel("heads kept per layer")
    axis.set_ylabel("objective")
    axis.legend()
    return _save(figure, path)


def dendrogram(distances: np.ndarray, labels: Sequence[int], path: str | Path) -> Path:
    """Ward's dendrogram of a layer's heads beside their distance matrix, in the same order. Labels
    name each head's group."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    figure, axes = _figure(1, 2, (10, 4.5))
    tree, heat = axes[0]
    names = [f"{head} (group {label})" for head, label in enumerate(labels)]
    links = linkage(squareform(distances, checks=False), "ward")
    order = dendrogram(links, labels=names, orientation="left", ax=tree)["leaves"]
    image = heat.imshow(distances[order][:, order], origin="lower", cmap="viridis")
    heat.set_xticks(range(len(order)), order)
    heat.set_yticks(range(len(order)), order)
    heat.set_title("distance")
    figure.colorbar(image, ax=heat)
    return _save(figure, path)


def layers(
    values: Mapping[str, Sequence[float]], label: str, path: str | Path, title: str = ""
) -> Path:
    """Lines over the layers, one per name."""
    figure, axes = _figure(1, 1, (7, 4))
    for name, line in values.items():
        axes[0][0].plot(range(len(line)), line, marker=".", label=name)
    axes[0][0].set_xlabel("layer")
    axes[0][0].set_ylabel(label)
    axes[0][0].set_title(title)
    axes[0][0].legend()
    return _save(figure, path)


def lines(
    named: Mapping[str, Mapping[float, float]], xlabel: str, ylabel: str, path: str | Path
) -> Path:
    """A line through the points ``{x: y}`` of each name, with a y axis from zero."""
    figure, axes = _figure(1, 1, (7, 4))
    axis = axes[0][0]
    for name, points in named.items():
        axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_ylim(bottom=0)
    axis.legend()
    return _save(figure, path)


def training(
    loss: Sequence[float], validation: Sequence[tuple[int, float]], path: str | Path
) -> Path:
    """Loss of every step, together with the validation loss."""
    figure, axes = _figure(1, 1, (7, 4))
    axis = axes[0][0]
    axis.plot(range(1, len(loss) + 1), loss, color="tab:blue", linewidth=0.8)
    axis.set_xlabel("step")
    axis.set_ylabel("loss", color="tab:blue")
    if validation:
        other = axis.twinx()
        other.plot(*zip(*validation, strict=True), color="tab:orange", marker="o")
        other.set_ylabel("validation perplexity", color="tab:orange")
    return _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'gqa-kernels[plots]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
