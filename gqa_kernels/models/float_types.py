"""The floating-point types of a model's tensors: remember them, compute in fp32, restore them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn

FloatTypes = dict[str, torch.dtype]


def float_types(model: nn.Module) -> FloatTypes:
    """The type of every floating-point parameter and buffer by name."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}


@torch.no_grad()
def set_float_types(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Convert the tensors of a model in place.

    Args:
        types: by name, as ``float_types`` returns them for this model or its parent. Other tensors
            keep their types.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.dtype != types.get(name, tensor.dtype):
            tensor.data = tensor.data.to(types[name])
