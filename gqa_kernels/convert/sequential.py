"""convert_sequentially(): calibrate and convert one layer after the other.

Each layer is calibrated on the outputs of the converted layers before it, so that its maps and
merged heads fit the inputs that it will see (the order of GPTQ, arXiv 2210.17323, and SparseGPT).
The data passes every block twice, whatever the depth. The inputs of the next block are kept in the
model's dtype, on its device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..grouping.calibration import attention_inputs
from ..grouping.merging import merge_layer
from ..grouping.moments import LayerStats, Sums
from ..head_map import HeadMap
from ..integrations.transformers import register
from ..models.families import AttentionLayer, attention_layers, family_of, layer_weights
from ..models.inputs import Batch, model_inputs, token_mask
from ..models.maps import IMPLEMENTATION
from ..reporting.progress import track
from .model import set_maps, write_layer

Choose = Callable[[AttentionLayer, LayerStats], tuple[HeadMap, HeadMap]]


class _Blocks:
    """The blocks of a model, run one at a time on kept inputs.

    Attributes:
        blocks: the modules.
        calls: for each batch and block, its arguments after the first.
        states: for each batch the input ``[B, S, d]`` of the next block.
        inputs: for each batch the model's inputs.
    """

    def __init__(self, model: nn.Module, path: str, batches: Iterable[Batch]):
        self.blocks = list(reduce(getattr, path.split("."), model.base_model))
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        self.states: list[Tensor] = []
        self.inputs: list[dict[str, Tensor]] = []
        for batch in batches:
            self._record(model, model_inputs(model, batch))

    def _record(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Run the whole model once and record the other arguments of each block."""
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if not calls:
                self.states.append(args[0])
            calls.append((args[1:], kwargs))

        hooks = [b.register_forward_pre_hook(hook, with_kwargs=True) for b in self.blocks]
        try:
            model.base_model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))
        finally:
            for each in hooks:
                each.remove()
        self.calls.append(calls)
        self.inputs.append(inputs)

    def run(self, index: int, keep: bool) -> None:
        """Run block ``index`` on all batches; its outputs become the next inputs if ``keep``."""
        for batch, states in enumerate(self.states):
            args, kwargs = self.calls[batch][index]
            out = self.blocks[index](states, *args, **kwargs)
            if keep:
                self.states[batch] = out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def convert_sequentially(
    model: nn.Module,
    batches: Iterable[Batch],
    choose: Choose,
    merging: str = "mean",
    *,
    restore_norms: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, list[LayerStats]]:
    """A converted copy of ``model``, every layer calibrated on the converted layers before it.

    Args:
        model: of a known family with one stack of blocks (not an encoder-decoder).
        batches: as in ``calibrate``; their hidden states are all kept.
        choose: ``choose(layer, stats) -> (K's map, V's map)``; ``layer`` is the next one to
            convert, ``layer_weights(layer)`` its weights.
        merging, restore_norms: as in ``convert``.
        progress: show a bar if standard error is a terminal.

    Returns:
        The child, set to ``asym_gqa`` attention, and the moments that each layer was converted by.

    Raises:
        ValueError: as ``calibrate`` and ``convert``.
        NotImplementedError: an encoder-decoder, or an unknown family.
    """
    family = family_of(model)
    if len(family.stacks) > 1:
        raise NotImplementedError(
            f"layers of a {family.model_types[0]} model can't be calibrated in sequence: it has "
            f"{len(family.stacks)} stacks; use calibrate and convert"
        )
    register(IMPLEMENTATION)
    child = copy.deepcopy(model).eval()
    child.set_attn_implementation(IMPLEMENTATION)
    layers = attention_layers(child)
    pairs = [(layer.key_map, layer.value_map) for layer in layers]
    for layer in layers:  # to the layout of converted layers, with the same maps
        write_layer(layer.module, layer.output, family, layer_weights(layer))
    set_maps(child, family, pairs)
    blocks = _Blocks(child, family.stacks[0].blocks, batches)
    found = []
    for layer in track(layers, "Converting layers", shown=progress):
        found.append(_moments(blocks, layer))
        pairs[layer.index] = choose(layer, found[-1])
        merged = merge_layer(
            layer_weights(layer),
            *pairs[layer.index],
            method=merging,
            moments=found[-1],
            restore_norms=restore_norms,
        )
        write_layer(layer.module, layer.output, family, merged)
        set_maps(child, family, pairs)
        blocks.run(layer.index, keep=True)
    return child.train(model.training), found


def _moments(blocks: _Blocks, layer: AttentionLayer) -> LayerStats:
    """Moments of a layer's input, from a run of its block."""
    sums = Sums()
    inputs = iter(blocks.inputs)

    def collect(_: nn.Module, args: tuple, kwargs: dict) -> None:
        (states,) = attention_inputs(layer, args, kwargs).values()
        sums.add(states, token_mask(next(inputs), layer.stack.mask, states), layer.index)

    hook = layer.module.register_forward_pre_hook(collect, with_kwargs=True)
    try:
        blocks.run(layer.index, keep=False)
    finally:
        hook.remove()
    return sums.finish()
