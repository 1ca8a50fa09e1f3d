"""Tiny children of every family that vLLM runs, and the tokens that transformers writes.

The oracle is the same function with K and V expanded, on transformers' own attention: none of our
kernels takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gqa_kernels import HeadMap
from gqa_kernels.cache.formats import FORMAT_OF_NAME, dequantize, quantize, row_scales
from gqa_kernels.convert import convert, save
from gqa_kernels.integrations.transformers import register
from tests import tiny_families, tiny_models

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "opt", "gpt2")
EXPANDED_BY_FAMILY = ("opt", "gpt2")  # the rest by tiny_models.expanded
CONTEXT = 64  # most tokens of a sequence: OPT and GPT-2 have no more positions


@dataclass
class Child:
    """An uneven model on disk.

    Attributes:
        folder: as ``gqa_kernels.convert.save`` wrote it.
        oracle: the same function in transformers.
    """

    folder: Path
    oracle: nn.Module

    def expected(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations, each computed from all tokens so far, without a cache."""
        found = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(new_tokens):
                with torch.no_grad():
                    logits = self.oracle(torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            found.append(ids[len(prompt) :])
        return found


def make_child(family: str, folder: Path) -> Child:
    """A child whose counts of KV heads differ between layers, and between K and V."""
    register()
    if family in EXPANDED_BY_FAMILY:
        parent = tiny_families.tiny(family)
        child = convert(parent, tiny_families.UNEVEN)
        oracle = tiny_families.stock(child, parent)
    else:
        child = convert(tiny_models.tiny(family, 6, 6), tiny_families.UNEVEN)
        oracle = tiny_models.expanded(child)
    return Child(save(child, folder / family), oracle)


def make_divisible_child(folder: Path) -> Child:
    """A child of 6 query heads over 3 KV heads: its counts divide, its groups are uneven."""
    register()
    maps = [HeadMap([0, 0, 0, 1, 2, 2]), HeadMap([2, 0, 1, 1, 1, 0])]
    child = convert(tiny_models.tiny("llama", 6, 6), maps)
    return Child(save(child, folder / "divisible"), tiny_models.expanded(child))


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, of mixed lengths from 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(3, tiny_models.VOCABULARY, (n,), generator=generator).tolist()
        for n in lengths
    ]


def quantised_attention(format: str, per_row: bool) -> str:
    """Register eager attention over K and V as a cache in that format returns them.

    Args:
        format: as :mod:`gqa_kernels.cache.formats` names it.
        per_row: a scale per token and head, with a zero for int4; otherwise the scale 1.

    Returns:
        The name of the attention implementation.
    """
    name = f"stored_as_{format}_{per_row}"
    AttentionInterface.register(name, partial(_attend_stored, format, per_row))
    return name


def _attend_stored(
    format: str, per_row: bool, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object,
    scaling: float, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    k, v = _stored(k, format, per_row), _stored(v, format, per_row)
    scores = scaling * q @ k.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2).contiguous(), None


def _stored(x: Tensor, name: str, per_row: bool) -> Tensor:
    format = FORMAT_OF_NAME[name]
    scale, zero = torch.ones(x.shape[:-1]), None
    if per_row:
        scale, zero = row_scales(x, format, with_zero=name == "int4")
    return dequantize(quantize(x, format, scale, zero), scale, zero)
