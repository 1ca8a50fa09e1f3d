"""First part: the model writes the same text, token by token, after an uneven KV head split."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn, tensor

from ..convert import convert, random_split
from ..head_map import HeadMap
from ..models.families import attention_layers
from ..reporting.errors import UsageError
from ..reporting.steps import Steps
from ..samples.smollm2 import LoadedModel
from .baseline import Comparison, compare
from .measure import generate
from .settings import Settings


@dataclass(frozen=True)
class Lossless:
    """The split model's results.

    Attributes:
        maps: the map of each layer, for K and V.
        stock_tokens, split_tokens: greedy continuations of the prompt.
        stock_text, split_text: the continuations as text.
        comparison: attention of the split model compared with expand + SDPA.
    """

    maps: list[HeadMap]
    stock_tokens: list[int]
    split_tokens: list[int]
    stock_text: str
    split_text: str
    comparison: Comparison

    @property
    def identical(self) -> bool:
        return self.stock_tokens == self.split_tokens


def split_maps(model: nn.Module, num_kv_heads: int, seed: int) -> list[HeadMap]:
    """A different lossless map of ``num_kv_heads`` KV heads for every layer."""
    return [
        random_split(layer.key_map, num_kv_heads, seed=f"{seed}.{layer.index}")
        for layer in attention_layers(model)
    ]


def run(loaded: LoadedModel, settings: Settings, steps: Steps) -> tuple[nn.Module, Lossless]:
    """Split the model, generate with both models, and compare their attention. Also returns the
    split model."""
    stock = loaded.model
    with steps.step(f"Splitting the KV heads into {settings.split_kv_heads} uneven groups"):
        maps = split_maps(stock, settings.split_kv_heads, settings.seed)
        split = convert(stock, maps, merging="none")
        split.set_attn_implementation("asym_gqa")
    prompt = loaded.tokenizer.encode(settings.prompt, add_special_tokens=False)
    if not prompt:
        raise UsageError(f"the prompt must have at least one token, got {settings.prompt!r}")
    prompt = tensor([prompt], device=stock.device)
    with steps.step("Generating: stock model, SDPA", settings.new_tokens) as advance:
        stock_tokens = generate(stock, prompt, settings.new_tokens, advance)
    with steps.step("Generating: split model, asym_gqa", settings.new_tokens) as advance:
        split_tokens = generate(split, prompt, settings.new_tokens, advance)
    with steps.step("Comparing attention with expand + SDPA"):
        ids = tensor([prompt[0].tolist() + stock_tokens], device=stock.device)
        comparison = compare(split, ids, min(8, settings.new_tokens), settings.backend)
    texts = (loaded.tokenizer.decode(tokens) for tokens in (stock_tokens, split_tokens))
    return split, Lossless(maps, stock_tokens, split_tokens, *texts, comparison)
