"""calibrate(): moments of the inputs of a model's attention layers, over some text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..convert.families import attention_layers

Batch = Tensor | Mapping[str, Tensor]


@dataclass
class LayerStats:
    """Moments of one attention layer's input ``x [d]`` over the tokens that are not padding.

    Everything is fp64 on the CPU.

    Attributes:
        count: tokens.
        mean: ``[d]``, E[x].
        second_moment: ``[d, d]``, E[x x^T].
        position_count: ``[P]``, tokens at each position of a sequence.
        position_mean: ``[P, d]``, E[x] at each position, 0 where there was no token.
    """

    count: int
    mean: Tensor
    second_moment: Tensor
    position_count: Tensor
    position_mean: Tensor


class _Sums:
    """Running sums of one layer; ``finish`` turns them into moments."""

    def __init__(self):
        self.outer: Tensor | None = None
        self.position_sum = torch.zeros(0, 0, dtype=torch.float64)
        self.position_count = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor, mask: Tensor) -> None:
        """x: ``[B, S, d]``; mask: ``[B, S]``, True where a token is not padding."""
        tokens = x[mask].float()  # [n, d]
        outer = (tokens.T @ tokens).double().cpu()
        self.outer = outer if self.outer is None else self.outer + outer
        kept = torch.where(mask[..., None], x, 0).double().sum(0).cpu()
        self.position_sum = _padded(self.position_sum, kept.shape) + _padded(
            kept, self.position_sum.shape
        )
        count = mask.sum(0).double().cpu()
        self.position_count = _padded(self.position_count, count.shape) + _padded(
            count, self.position_count.shape
        )

    def finish(self) -> LayerStats:
        count = int(self.position_count.sum())
        return LayerStats(
            count,
            self.position_sum.sum(0) / count,
            self.outer / count,
            self.position_count,
            self.position_sum / self.position_count.clamp(min=1)[:, None],
        )


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Batch]) -> list[LayerStats]:
    """Run text through a Hugging Face model and collect moments of every attention input.

    Args:
        model: a causal LM of a known family, on any device.
        batches: ``input_ids [B, S]``, or dicts with ``input_ids`` and an ``attention_mask [B, S]``
            (0 on padding, which is left out of every moment). Wrap it to show progress.

    Returns:
        One entry per attention layer.

    Raises:
        ValueError: no batch, only padding, or activations that are not finite.
        NotImplementedError: the model's family is not known.
    """
    layers = attention_layers(model)
    sums = [_Sums() for _ in layers]
    mask = torch.ones(0, 0, dtype=torch.bool)

    def collect(layer: int, args: tuple, kwargs: dict) -> None:
        sums[layer].add(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], mask)

    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs, index=layer.index: collect(index, args, kwargs),
            with_kwargs=True,
        )
        for layer in layers
    ]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            given = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"]) if given is None else given
            mask = mask.bool()
            model.base_model(**inputs, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if sums[0].outer is None or not sums[0].position_count.sum():
        raise ValueError("batches must hold at least one token that is not padding, got none")
    stats = [each.finish() for each in sums]
    for index, layer in enumerate(stats):
        if not layer.second_moment.isfinite().all():
            raise ValueError(f"activations must be finite, got NaN or inf in layer {index}")
    return stats


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` with zeros appended up to ``shape`` (dims that are larger stay)."""
    if all(have >= want for have, want in zip(tensor.shape, shape, strict=True)):
        return tensor
    out = tensor.new_zeros([max(a, b) for a, b in zip(tensor.shape, shape, strict=True)])
    out[tuple(slice(n) for n in tensor.shape)] = tensor
    return out
