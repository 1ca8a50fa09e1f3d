"""Generation, perplexity, speed and KV bytes of a causal LM."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WARM_UP = 64  # tokens of the prefill that warms up a variant


@torch.inference_mode()
def generate(model: nn.Module, ids: Tensor, new_tokens: int, advance: Callable[[], None]) -> list:
    """Greedy continuation of ``ids [1, n]`` by ``model.generate`` with its KV cache."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Tick(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: object) -> Tensor:
            advance()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([Tick()]),
    )
    return out[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def perplexity(model: nn.Module, rows: Tensor, advance: Callable[[], None]) -> float:
    """exp of the mean next-token cross entropy over ``rows [texts, length]``; each row is one
    text."""
    loss = 0.0
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        loss += cross_entropy(logits, row[1:], reduction="sum").item()
        advance()
    return math.exp(loss / (rows.numel() - len(rows)))


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions.

    Attributes:
        prefill, decode: tokens per second of the whole model, batch 1.
        kv_bytes_per_token: memory of the KV cache's tensors in all layers, divided by its tokens.
    """

    prefill: float
    decode: float
    kv_bytes_per_token: int


def speeds(
    variants: dict[str, tuple[nn.Module, str]],
    ids: Tensor,
    decode_steps: int,
    repeats: int,
    advance: Callable[[], None],
) -> dict[str, Speed]:
    """Time the variants in turn, so that other load on the machine affects all of them alike.

    Args:
        variants: for each name, a model and the ``attn_implementation`` to run it with.
        ids: ``[1, n]`` tokens to prefill.
        decode_steps: tokens decoded after them, one by one.
    """
    prefill: dict[str, list[float]] = {name: [] for name in variants}
    decode: dict[str, list[float]] = {name: [] for name in variants}
    kv_bytes: dict[str, int] = {}
    for repeat in range(-1, repeats):
        for name, (model, implementation) in variants.items():
            model.set_attn_implementation(implementation)
            if repeat < 0:
                _timed(model, ids[:, :WARM_UP], 1)
            else:
                *seconds, kv_bytes[name] = _timed(model, ids, decode_steps)
                prefill[name].append(seconds[0])
                decode[name].append(seconds[1])
            advance()
    return {
        name: Speed(
            ids.shape[1] / statistics.median(prefill[name]),
            decode_steps / statistics.median(decode[name]),
            kv_bytes[name],
        )
        for name in variants
    }


@torch.inference_mode()
def _timed(model: nn.Module, ids: Tensor, steps: int) -> tuple[float, float, int]:
    """Seconds of a prefill, seconds of the following decode steps, and KV bytes per token."""
    _synchronize(ids.device)
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    _synchronize(ids.device)
    middle = time.perf_counter()
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    _synchronize(ids.device)
    ended = time.perf_counter()
    return middle - started, ended - middle, kv_bytes_per_token(out.past_key_values)


@torch.inference_mode()
def kv_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes per token of the model's KV cache after ``ids [1, n]``."""
    return kv_bytes_per_token(model(ids, use_cache=True, logits_to_keep=1).past_key_values)


def kv_bytes_per_token(cache: Any) -> int:
    """Bytes of a transformers cache's tensors, divided by its tokens; batch 1."""
    storages = [t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)]
    unique = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(unique.values()) // cache.get_seq_length()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
