"""calibrate(): moments of the inputs of a model's attention layers, over text or images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.families import AttentionLayer, attention_layers
from ..models.fingerprint import DataDigest, check_same, fingerprint
from ..models.inputs import Batch, model_inputs, token_mask
from ..reporting.interval import Interval
from ..reporting.progress import track
from .moments import LayerStats, Sums, combine, load_sums, save_sums


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    halves: bool = False,
    resume: str | Path | None = None,
    save_seconds: float = 60.0,
    progress: bool = False,
) -> list[LayerStats]:
    """Run data through a Hugging Face model and collect moments of every attention input.

    Collects all layers in one pass, on the inputs they have in the unconverted model.
    ``convert.sequential`` calibrates layer by layer on the outputs of converted layers.

    Args:
        model: of a known family, on any device.
        batches: ``input_ids [B, S]``, ``pixel_values [B, C, H, W]`` (a floating-point tensor), or
            dicts of the model's inputs; masks (``attention_mask [B, S]``, for encoder-decoders also
            ``decoder_attention_mask``) are 0 on padding, which is left out of every moment.
        halves: keep the moments of every second batch apart, for ``split_half``: twice the memory.
        resume: file for the running sums. If it exists, the run continues from it and skips the
            batches that are in it. It is replaced as a whole, never half-written.
        save_seconds: time between two writes of that file; the first batch is written at once.
        progress: show a bar if standard error is a terminal.

    Returns:
        One entry per attention layer.

    Raises:
        ValueError: no batch, only padding, activations that are not finite, tokens that the model
            doesn't know, or a file to resume from that was made from another model or other data.
        NotImplementedError: the model's family is not known.

    Examples:
        >>> stats = calibrate(model, texts)  # tensors of token ids
    """
    layers = attention_layers(model)
    names = [name for layer in layers for name in _names(layer)]
    sums, done = [{name: Sums() for name in names} for _ in range(1 + halves)], 0
    total = len(batches) if hasattr(batches, "__len__") else None
    remaining, data = iter(batches), DataDigest()
    made_from = {} if resume is None else fingerprint(model, halves=halves)
    if resume is not None and Path(resume).exists():
        sums, done, stored = load_sums(resume, names, 1 + halves, made_from)
        for batch in islice(remaining, done):
            data.add(batch)
        check_same(resume, stored, {"data": data.value})
    seen, interval = done, Interval(save_seconds)
    with _collecting(model, layers) as collect:
        for batch in track(remaining, "Calibrating", total, progress, done):
            collect(model_inputs(model, batch), sums[seen % len(sums)])
            seen += 1
            if resume is not None:
                data.add(batch)
                if interval.is_due():
                    save_sums(resume, sums, seen, made_from | {"data": data.value})
                    interval.restart()
    if resume is not None and seen > done:
        save_sums(resume, sums, seen, made_from | {"data": data.value})
    return [_stats(layer, sums) for layer in layers]


def attention_inputs(layer: AttentionLayer, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """The inputs of a call of an attention module, by the names of ``_names``.

    They are its ``hidden_states``, and in cross-attention the states that K and V come from.
    """
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if layer.stack.kv_mask is None:
        return {f"{layer.index}": states}
    return {f"{layer.index}": kwargs["key_value_states"], f"{layer.index}.query": states}


def _names(layer: AttentionLayer) -> list[str]:
    """Names of the inputs of a layer: of K and V, and of q if that is another one."""
    return [f"{layer.index}", *([f"{layer.index}.query"] if layer.stack.kv_mask else [])]


def _masks(layer: AttentionLayer) -> list[str]:
    stack = layer.stack
    return [stack.mask] if stack.kv_mask is None else [stack.kv_mask, stack.mask]


@contextmanager
def _collecting(
    model: nn.Module, layers: list[AttentionLayer]
) -> Iterator[Callable[[dict[str, Tensor], dict[str, Sums]], None]]:
    """A function that runs the model and adds its attention inputs to sums."""
    inputs: dict[str, Tensor] = {}
    sums: dict[str, Sums] = {}

    def hook(layer: AttentionLayer) -> Callable:
        def collect(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = attention_inputs(layer, args, kwargs)
            for (name, states), mask in zip(given.items(), _masks(layer), strict=True):
                sums[name].add(states, token_mask(inputs, mask, states), layer.index)

        return collect

    def run(batch: dict[str, Tensor], into: dict[str, Sums]) -> None:
        inputs.clear()
        inputs.update(batch)
        sums.clear()
        sums.update(into)
        model.base_model(**batch, **({} if "pixel_values" in batch else {"use_cache": False}))

    hooks = [
        layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers
    ]
    training = model.training
    try:
        model.eval()
        yield run
    finally:
        model.train(training)
        for each in hooks:
            each.remove()


def _stats(layer: AttentionLayer, sums: list[dict[str, Sums]]) -> LayerStats:
    """The moments of one layer, of all batches and of each half."""
    parts = [[part[name] for part in sums] for name in _names(layer)]
    halves = [_finish([kept[half] for kept in parts]) for half in range(len(sums))]
    whole = _finish([combine(kept) for kept in parts])
    if len(halves) == 2:
        whole.halves = tuple(halves)
    return whole


def _finish(sums: list[Sums]) -> LayerStats:
    stats = sums[0].finish()
    if len(sums) == 2:
        stats.query = sums[1].finish()
    return stats
