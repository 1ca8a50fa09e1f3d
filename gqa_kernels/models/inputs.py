"""A model's inputs: batches as keyword arguments, and which of their tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .families import family_of

Batch = Tensor | Mapping[str, Tensor]
_TOKENS = ("input_ids", "decoder_input_ids", "labels")
_IGNORED = -100  # label of tokens that the loss ignores


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch as keyword arguments of a model, on its device.

    batch: ``input_ids [B, S]``, ``pixel_values [B, C, H, W]`` (a floating-point tensor), or a dict
        of inputs by name.

    Raises:
        TypeError: token ids are not integers.
        ValueError: token ids lie outside the model's vocabulary, or a row is longer than its
            learned positions.
    """
    if isinstance(batch, Tensor):
        batch = {"pixel_values" if batch.is_floating_point() else "input_ids": batch}
    for name in _TOKENS:
        if name in batch and batch[name].dim() == 2:  # labels of images have one dim
            _check_tokens(model, name, batch[name])
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def token_mask(inputs: Mapping[str, Tensor], name: str, states: Tensor) -> Tensor:
    """``[B, S]``: False for tokens of ``states [B, S, d]`` that the named mask marks as padding."""
    mask = inputs.get(name)
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.bool()


def _check_tokens(model: nn.Module, name: str, ids: Tensor) -> None:
    """Check ids, because an embedding reads out of bounds or raises IndexError on invalid ones."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    most = getattr(model.config, "max_position_embeddings", None)
    if family_of(model).rotary is None and most is not None and ids.shape[1] > most:
        raise ValueError(
            f"{name} must have at most {most} tokens a row, the model's positions, got "
            f"{ids.shape[1]}"
        )
    known = model.get_input_embeddings().num_embeddings
    if name == "labels":
        ids = ids[ids != _IGNORED]
    if ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= known:
            raise ValueError(
                f"{name} must lie in [0, {known}), the model's vocabulary, got "
                f"{low if low < 0 else high}"
            )
