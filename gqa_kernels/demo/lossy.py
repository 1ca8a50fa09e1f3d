"""Second part: fewer KV heads by a map found from activations, and what that does to perplexity.

Every query head counts as having its own K and V (copies of the shared ones), as in an MHA model.
The query heads are grouped by similarity and each group's K and V projections are averaged. There
is no training afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..convert import convert
from ..grouping import search
from ..grouping.calibration import LayerStats, calibrate
from ..grouping.similarity import similarity
from ..head_map import HeadMap
from ..models.families import attention_layers
from ..reporting.steps import Steps
from ..samples.smollm2 import LoadedModel
from ..samples.text import calibration_text, evaluation_text, rows
from .measure import kv_bytes, perplexity
from .settings import Settings

LayerMaps = list[tuple[HeadMap, HeadMap]]


@dataclass(frozen=True)
class Merged:
    """One model and its perplexity.

    Attributes:
        method: how its groups were found.
        kv_heads: ``Hkv``.
        maps: (K's map, V's map) of each layer.
        kv_bytes_per_token: of the KV cache.
        perplexity: on the evaluation text.
    """

    method: str
    kv_heads: int
    maps: LayerMaps
    kv_bytes_per_token: int
    perplexity: float


def neighbour_maps(model: nn.Module, num_kv_heads: int) -> LayerMaps:
    """Adjacent query heads together, the same for K and V, as in uptraining for GQA."""
    layers = attention_layers(model)
    found = [
        search(similarity(model, None, layer.index, "k", "weight"), num_kv_heads, "neighbour")
        for layer in layers
    ]
    return [(result.head_map, result.head_map) for result in found]


def similar_maps(model: nn.Module, stats: list[LayerStats], num_kv_heads: int) -> LayerMaps:
    """Optimal partitions of the query heads by how alike their keys (and their values) are."""
    return [
        tuple(
            search(similarity(model, stats, layer.index, side), num_kv_heads, "exact").head_map
            for side in ("k", "v")
        )
        for layer in attention_layers(model)
    ]


def run(loaded: LoadedModel, settings: Settings, steps: Steps) -> list[Merged]:
    """Calibrate, search, merge and measure; the first entry is the stock model."""
    stock, tokenizer = loaded.model, loaded.tokenizer
    texts = rows(tokenizer, calibration_text(), settings.calibration_shape).to(stock.device)
    with steps.step("Calibrating: activations of every attention input", len(texts)) as advance:
        stats = calibrate(stock, _ticking(texts.split(1), advance))
    held_out = rows(tokenizer, evaluation_text(), settings.evaluation_shape).to(stock.device)
    layers = attention_layers(stock)
    own = [(layer.key_map, layer.value_map) for layer in layers]
    results = [_measure("stock", stock, own, held_out, steps)]
    for num_kv_heads in settings.merged_kv_heads:
        with steps.step(f"Searching maps of {num_kv_heads} KV heads"):
            found = {
                "neighbour": neighbour_maps(stock, num_kv_heads),
                "similarity": similar_maps(stock, stats, num_kv_heads),
            }
        for method, maps in found.items():
            child = convert(stock, maps, merging="mean")
            child.set_attn_implementation("asym_gqa")
            results.append(_measure(method, child, maps, held_out, steps))
    return results


def _measure(
    method: str, model: nn.Module, maps: LayerMaps, held_out: Tensor, steps: Steps
) -> Merged:
    kv_heads = maps[0][0].num_kv_heads
    title = f"Perplexity: {method}, {kv_heads} KV heads"
    with steps.step(title, len(held_out)) as advance:
        value = perplexity(model, held_out, advance)
    return Merged(method, kv_heads, maps, kv_bytes(model, held_out[:1, :8]), value)


def _ticking(batches, advance):
    for batch in batches:
        yield batch
        advance()
