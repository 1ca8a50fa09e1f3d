"""PredictionShift: how far a model's predictions are from its parent's, on fixed inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ..models.inputs import Batch, model_inputs, token_mask
from .evaluation import hidden_states, padding_mask, predicts_next_token, run


class PredictionShift:
    """``shift(child)``: mean over tokens of KL(parent || child) of the next-token distributions, in
    nats. Of models without next-token predictions it is the squared change of the last hidden
    states over their variance.

    Args:
        parent: what children are compared with. Its predictions are computed once and kept: one
            fp32 number per token and word of the vocabulary.
        batches: as ``calibrate`` takes them; padding is left out.

    Raises:
        ValueError: no token that is not padding.

    Example::

        shift = PredictionShift(model, texts)
        recover(child, others, recipe, parent=model, validate=shift)
    """

    def __init__(self, parent: nn.Module, batches: Iterable[Batch]):
        self.causal = predicts_next_token(parent)
        self.inputs = [model_inputs(parent, batch) for batch in batches]
        self._before = [self._predictions(parent, batch) for batch in self.inputs]
        self.tokens = sum(len(old) for old in self._before)
        if not self.tokens:
            raise ValueError("batches must hold at least one token that is not padding, got none")

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        total = 0.0
        for inputs, old in zip(self.inputs, self._before, strict=True):
            new = self._predictions(model, inputs)
            if self.causal:
                total += float(kl_div(new, old, reduction="sum", log_target=True))
            else:
                total += float((new - old).square().sum() / old.var(0).sum())
        return total / self.tokens

    @torch.no_grad()
    def _predictions(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """``[n, V]`` log-probabilities, or ``[n, d]`` states."""
        training = model.training
        model.eval()
        output = run(model, inputs)
        model.train(training)
        found = output.logits if self.causal else hidden_states(output)
        found = found[token_mask(inputs, padding_mask(inputs), found)].float()
        return found.log_softmax(-1) if self.causal else found
