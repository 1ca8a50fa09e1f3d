"""Second part: fewer KV heads, found and merged in three ways, and their effect on perplexity.

The parent is treated as an MHA model: every query head has its own K and V, copies of the shared
ones.

- ``neighbour, mean``: adjacent heads are averaged, as in GQA.
- ``Align``: even groups of aligned heads (arXiv 2412.20677), here the optimal ones.
- ``measured loss``: groups of least measured loss. Heads are distributed over K, V and layers, and
  merged with low rank. The model with the fewest heads is also trained briefly on the parent's
  predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..convert import convert
from ..convert.loss_plan import plan_by_loss
from ..convert.losses import losses_of
from ..convert.recovery import Recipe, recover
from ..convert.sensitivity import layer_weights_by
from ..grouping import search
from ..grouping.calibration import LayerStats, calibrate
from ..grouping.search.partitions import even_limits
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
        method: how its groups were found and merged.
        kv_heads: K and V heads of a layer, averaged over both and over the layers.
        maps: (K's map, V's map) of each layer.
        kv_bytes_per_token: size of the KV cache.
        perplexity: on the evaluation text.
    """

    method: str
    kv_heads: float
    maps: LayerMaps
    kv_bytes_per_token: int
    perplexity: float


def neighbour_maps(model: nn.Module, num_kv_heads: int) -> LayerMaps:
    """Groups of adjacent query heads, the same for K and V, as in uptraining for GQA."""
    layers = attention_layers(model)
    found = [
        search(similarity(model, None, layer.index, "k", "weight"), num_kv_heads, "neighbour")
        for layer in layers
    ]
    return [(result.head_map, result.head_map) for result in found]


def aligned_maps(model: nn.Module, stats: list[LayerStats], num_kv_heads: int) -> LayerMaps:
    """Optimal even groups by the similarity of aligned keys and values."""
    maps = []
    for layer in attention_layers(model):
        sizes = even_limits(layer.num_heads, num_kv_heads)
        sides = [similarity(model, stats, layer.index, side, "aligned_cosine") for side in "kv"]
        found = [search(D, num_kv_heads, sizes=sizes) for D in sides]
        maps.append((found[0].head_map, found[1].head_map))
    return maps


def run(loaded: LoadedModel, settings: Settings, steps: Steps) -> list[Merged]:
    """Calibrate, search, merge and measure. The first entry is the stock model."""
    stock, tokenizer = loaded.model, loaded.tokenizer
    texts = rows(tokenizer, calibration_text(), settings.calibration_shape).to(stock.device)
    texts, chosen_by = texts.split([len(texts) * 3 // 4, -(-len(texts) // 4)])
    with steps.step("Calibrating: activations of every attention input", len(texts)) as advance:
        stats = calibrate(stock, _ticking(texts.split(1), advance))
    held_out = rows(tokenizer, evaluation_text(), settings.evaluation_shape).to(stock.device)
    layers = attention_layers(stock)
    own = [(layer.key_map, layer.value_map) for layer in layers]
    results = [_measure("stock", stock, own, held_out, steps)]
    with steps.step(f"Measuring losses and weights of {len(layers)} layers"):
        chosen_by = chosen_by.split(1)
        losses = losses_of(stock, stats, chosen_by)
        weights = layer_weights_by("kl", stock, chosen_by, losses, stats)
    for num_kv_heads in settings.merged_kv_heads:
        with steps.step(f"Searching maps of {num_kv_heads} KV heads"):
            ours = plan_by_loss(losses, weights, budget=2 * num_kv_heads * len(layers))
            found = {
                "neighbour, mean": (neighbour_maps(stock, num_kv_heads), "mean"),
                "Align": (aligned_maps(stock, stats, num_kv_heads), "aligned"),
                "measured loss": (ours.maps, losses[0].merging),
            }
        for method, (maps, merging) in found.items():
            child = convert(stock, maps, merging, moments=stats)
            child.set_attn_implementation("asym_gqa")
            results.append(_measure(method, child, maps, held_out, steps))
    if settings.recovery_steps:
        recipe = Recipe(steps=settings.recovery_steps, warmup=2, distillation=1.0)
        with steps.step(f"Training: {recipe.steps} steps on the parent's predictions"):
            recover(child, list(texts.split(1)), recipe, parent=stock)
        method = f"measured loss, {recipe.steps} steps"
        results.append(_measure(method, child, maps, held_out, steps))
    return results


def _measure(
    method: str, model: nn.Module, maps: LayerMaps, held_out: Tensor, steps: Steps
) -> Merged:
    kv_heads = sum(m.num_kv_heads for pair in maps for m in pair) / (2 * len(maps))
    title = f"Perplexity: {method}, {kv_heads:g} KV heads"
    with steps.step(title, len(held_out)) as advance:
        value = perplexity(model, held_out, advance)
    return Merged(method, kv_heads, maps, kv_bytes(model, held_out[:1, :8]), value)


def _ticking(batches, advance):
    for batch in batches:
        yield batch
        advance()
