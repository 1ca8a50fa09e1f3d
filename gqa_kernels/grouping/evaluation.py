"""Held-out attention-output error: what other KV heads do to each attention layer, apart from the
others, on inputs that the search has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.families import AttentionLayer, attention_layers
from ..models.inputs import Batch, model_inputs, token_mask


@torch.no_grad()
def layer_errors(parent: nn.Module, child: nn.Module, batches: Iterable[Batch]) -> list[float]:
    """Error of each attention layer of ``child`` on the inputs that layer has in ``parent``.

    The mean squared difference of the two layers' outputs over the variance of the parent's: 0 is
    the same function, 1 the error of the best constant output.

    Args:
        parent: a Hugging Face model of a known family.
        child: ``convert(parent, ...)``, set to an attention that runs its maps.
        batches: as ``calibrate`` takes them; padding is left out.

    Raises:
        ValueError: no tokens, or outputs that are not finite.

    Examples:
        >>> layer_errors(parent, child, held_out)  # one number per attention layer
    """
    layers = list(zip(attention_layers(parent), attention_layers(child), strict=True))
    sums = [_Sums() for _ in layers]
    inputs: dict[str, Tensor] = {}
    calls: dict[int, tuple[tuple, dict]] = {}

    def compare(old: AttentionLayer, new: AttentionLayer, output: Tensor) -> None:
        args, kwargs = calls.pop(old.index)
        mask = token_mask(inputs, old.stack.mask, output)
        sums[old.index].add(output[mask], _output(new, args, kwargs)[mask])

    hooks = []
    for old, new in layers:
        hooks += [
            old.module.register_forward_pre_hook(
                lambda _, args, kwargs, i=old.index: calls.update({i: (args, kwargs)}),
                with_kwargs=True,
            ),
            old.output.register_forward_hook(
                lambda _, __, output, old=old, new=new: compare(old, new, output)
            ),
        ]
    training = parent.training, child.training
    try:
        parent.eval()
        child.eval()
        for batch in batches:
            inputs.clear()
            inputs.update(model_inputs(parent, batch))
            options = {} if "pixel_values" in inputs else {"use_cache": False}
            parent.base_model(**inputs, **options)
    finally:
        parent.train(training[0])
        child.train(training[1])
        for hook in hooks:
            hook.remove()
    return [each.error(index) for index, each in enumerate(sums)]


class _Sums:
    """Sums over tokens of a layer's outputs ``y [d]`` and of what another layer makes of them."""

    def __init__(self):
        self.count, self.total, self.square, self.difference = 0, 0.0, 0.0, 0.0

    def add(self, given: Tensor, now: Tensor) -> None:
        """Both ``[n, d]``."""
        given, now = given.double(), now.double()
        self.count += len(given)
        self.total = self.total + given.sum(0)
        self.square += float(given.square().sum())
        self.difference += float((now - given).square().sum())

    def error(self, layer: int) -> float:
        if not self.count:
            raise ValueError("batches must hold at least one token that is not padding, got none")
        if not (math.isfinite(self.square) and math.isfinite(self.difference)):
            raise ValueError(f"attention outputs must be finite, got NaN or inf in layer {layer}")
        variance = self.square - float(self.total.square().sum()) / self.count
        if variance <= 0:
            raise ValueError(f"attention outputs must vary, got the same for all in layer {layer}")
        return self.difference / variance


def _output(layer: AttentionLayer, args: tuple, kwargs: dict) -> Tensor:
    """``[B, S, d]`` of a layer's output projection, whether or not its module applies it."""
    found: list[Tensor] = []
    hook = layer.output.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        heads = layer.module(*args, **kwargs)[0]
        if not found:
            layer.output(heads)
    finally:
        hook.remove()
    return found[0]
