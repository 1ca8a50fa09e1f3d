"""How much an error in each layer's attention costs the whole model: the weights between layers
when a total of KV heads is spent.

A layer's loss is the squared change of its attention output. How much that moves the model's
predictions differs from layer to layer. Two estimators:

- ``"kl"``: each layer is converted alone, and the KL divergence of the model's predictions from the
  parent's is divided by that layer's loss. One forward pass per layer over about a thousand
  tokens. For models without next-token predictions it is the squared change of the last hidden
  states over their variance.
- ``"fisher"``: the second-order estimate of the same KL. Its quadratic form is the covariance of
  gradients of ``log p(token)`` with tokens drawn from the model itself; it is averaged over the
  directions of the output. One forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..grouping.calibration import LayerStats
from ..head_map import HeadMap
from ..models.families import attention_layers
from ..models.inputs import Batch, model_inputs, token_mask
from ..reporting.progress import track
from .evaluation import predicts_next_token, run
from .losses import MergeLosses
from .model import convert
from .shift import PredictionShift

WEIGHTS = ("kl", "fisher", "none")
_KL_TOKENS = 1024  # batches are taken until they hold as many


def layer_weights_by(
    estimator: str,
    model: nn.Module,
    batches: Iterable[Batch],
    losses: Sequence[MergeLosses],
    stats: Sequence[LayerStats] | None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """``[L]`` what one unit of each layer's loss costs the model, in nats a token.

    Args:
        estimator: one of ``WEIGHTS``; ``"none"`` is 1 for every layer.
        model: the parent.
        batches: held-out inputs.
        losses: of the layers, on the same tokens.
        stats: of ``calibrate``.
        seed: of the tokens that ``"fisher"`` draws.
        progress: show a bar if standard error is a terminal.

    Raises:
        ValueError: an unknown estimator, or ``"fisher"`` for a model that doesn't predict tokens.
    """
    if estimator not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {estimator!r}")
    if estimator == "none":
        return [1.0] * len(losses)
    batches = [model_inputs(model, batch) for batch in batches]
    if estimator == "fisher":
        return _fisher(model, batches, losses, seed)
    return _kl(model, batches, losses, stats, progress)


def _kl(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    losses: Sequence[MergeLosses],
    stats: Sequence[LayerStats] | None,
    progress: bool,
) -> list[float]:
    weights, some, tokens = [], [], 0
    for batch in batches:
        some.append(batch)
        first = next(iter(batch.values()))
        tokens += first.shape[0] * (first.shape[1] if first.dim() == 2 else 1)
        if tokens >= _KL_TOKENS:
            break
    shift = PredictionShift(model, some)
    own = [(layer.key_map, layer.value_map) for layer in attention_layers(model)]
    for index, loss in enumerate(track(losses, "Weighing layers", shown=progress)):
        maps = list(own)
        # Half the heads, adjacent pairs: a change of the size that searches choose among.
        pairs = HeadMap([h // 2 for h in range(loss.num_heads)])
        maps[index] = (pairs, pairs)
        child = convert(model, maps, loss.merging, moments=stats, share_weights=True)
        child.set_attn_implementation("asym_gqa")
        cost = loss.joint(pairs, pairs)
        weights.append(shift(child) / cost if cost > 0 else 0.0)
    # A layer whose heads are copies of each other has no loss and needs no weight.
    known = [weight for weight in weights if weight > 0]
    return [weight or (min(known) if known else 1.0) for weight in weights]


def _fisher(
    model: nn.Module, batches: list[dict[str, Tensor]], losses: Sequence[MergeLosses], seed: int
) -> list[float]:
    if not predicts_next_token(model):
        raise ValueError("weights='fisher' needs a model that predicts next tokens")
    layers = attention_layers(model)
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[int, Tensor] = {}

    def keep(index: int, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_() if not output.requires_grad else output
        output.retain_grad()
        outputs[index] = output
        return output

    hooks = [
        layer.output.register_forward_hook(lambda _, __, out, i=layer.index: keep(i, out))
        for layer in layers
    ]
    training, squares, tokens = model.training, [0.0] * len(layers), 0
    try:
        model.eval()
        for batch in batches:
            with torch.enable_grad():
                logits = run(model, batch).logits.float()
                mask = token_mask(batch, "attention_mask", logits)
                scores = logits[mask].log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
                scores.gather(1, drawn.to(scores.device)).sum().backward()
            tokens += int(mask.sum())
            for layer in layers:
                gradient = outputs[layer.index].grad
                squares[layer.index] += float(gradient[mask].double().square().sum())
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        model.zero_grad(set_to_none=True)
    # KL is half the quadratic form; a loss of 1 is an error of the layer's whole variance.
    width = [outputs[layer.index].shape[-1] for layer in layers]
    return [
        0.5 * square / tokens / dims * loss.variance
        for square, dims, loss in zip(squares, width, losses, strict=True)
    ]
