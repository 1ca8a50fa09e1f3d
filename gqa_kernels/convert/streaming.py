"""convert_from_disk(): search, convert and save a checkpoint that doesn't fit into memory.

The weights are never all in memory: they are views of the mapped files, in the checkpoint's own
types, and their pages are dropped after use. The blocks run one after the other on the kept hidden
states of all texts. While a block runs, its attention inputs are summed up (calibration texts) or
its attention is recorded (held-out texts). Then the layer is searched and its memory freed, except
for its moments, which go to a file. When all layers have been searched, each is merged and written
to a shard of its own.

What needs the whole model is left out: layers are weighed by ``weights`` that the caller gives (1
each by default), not by their effect on the model's predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..grouping.calibration import attention_inputs
from ..grouping.merging import merge_layer
from ..grouping.moments import LayerStats, Sums, load_stats, save_stats
from ..grouping.result import SearchResult
from ..models.checkpoint_files import INDEX, WEIGHTS, weight_files
from ..models.families import (
    AttentionLayer,
    attention_blocks,
    attention_layers,
    family_of,
    layer_weights,
)
from ..models.inputs import Batch, model_inputs, token_mask
from ..models.mapped import release
from ..models.maps import guard
from ..reporting.files import check_new_folder, new_folder
from ..reporting.progress import track
from .checkpoint import load
from .loss_plan import Side, choose, counts_of
from .losses import SIDES, AttentionSample, MergeLosses, recording
from .model import set_maps, write_layer
from .plan import LOSS, LayerPlan, Plan, check_plan


@torch.no_grad()
def convert_from_disk(
    folder: str | Path,
    out: str | Path,
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    num_kv_heads: int | None = None,
    budget: int | None = None,
    weights: Sequence[float] | None = None,
    sizes: str = "auto",
    shared: bool = False,
    merging: str = "low_rank",
    queries: int = 1024,
    work: str | Path,
    processor: Any = None,
    progress: bool = False,
) -> Plan:
    """Search maps for all layers of a checkpoint by measured losses, and write the converted one.

    Args:
        folder: a checkpoint with its weights in safetensors, of a family with one stack of blocks.
        out: the folder to write; must not exist, or be empty.
        batches: calibration texts, as ``calibrate`` takes them.
        held_out: other texts, that losses are measured on.
        num_kv_heads, budget: one of the two, as for ``plan``. With a budget, K and V of a layer are
            searched apart only, because a layer's share is known when all have been searched.
        weights: what a unit of each layer's loss costs, for a budget; 1 each by default.
        sizes, shared, merging: as for ``plan``.
        queries: held-out query tokens that a loss is measured on.
        work: a folder for the layers' moments: 8 d^2 bytes for a layer of width d.
        processor: as for ``save``.
        progress: show bars if standard error is a terminal.

    Returns:
        The plan; its maps are those of the checkpoint in ``out``.

    Raises:
        ValueError: as ``plan``, ``load`` and ``save``.
        NotImplementedError: an encoder-decoder, an unknown family, or one whose files name weights
            otherwise than its modules.

    Examples:
        >>> found = convert_from_disk("parent", "child", texts, others, num_kv_heads=8, work="work")
    """
    out, work = check_new_folder("out", out), Path(work)
    model = load(folder, dtype="auto")
    check_plan(
        model, num_kv_heads, budget=budget, kind=LOSS, method="exact", sizes=sizes, merging=merging
    )
    layers, blocks = attention_layers(model), attention_blocks(model)
    if len(family_of(model).stacks) > 1 or len(layers) != len(blocks):
        raise NotImplementedError(
            f"a {family_of(model).model_types[0]} model can't be converted from disk, because its "
            "blocks are not one stack with an attention layer each; use plan and convert"
        )
    if weights is not None and len(weights) != len(layers):
        raise ValueError(f"weights must have {len(layers)} entries, got {len(weights)}")
    names = _names(model, Path(folder))
    work.mkdir(parents=True, exist_ok=True)
    sides = ("shared",) if shared else SIDES
    average = num_kv_heads or (budget or 0) // (2 * len(layers))
    curves: list[dict[str, dict[int, float]]] = []
    found: list[LayerPlan] = []
    offers: list[dict[str, dict[int, SearchResult]]] = []
    with recording(model) as record:
        calibration = _Stream(model, blocks, [model_inputs(model, b) for b in batches], record)
        other = _Stream(model, blocks, [model_inputs(model, b) for b in held_out], record)
        for layer in track(layers, "Searching layers", shown=progress):
            stats = calibration.moments(layer)
            save_stats([stats], _moments(work, layer))
            losses = MergeLosses(
                layer_weights(layer), other.attention(layer), stats, merging, queries=queries
            )
            _drop(blocks[layer.index])
            searches = {s: Side(losses, s, sizes, average, max(1, average // 2)) for s in sides}
            curves.append({side: search.curve for side, search in searches.items()})
            if num_kv_heads is not None:
                count = dict.fromkeys(sides, num_kv_heads)
                pair, rule, error = choose(losses, searches, count, sizes)
                found.append(LayerPlan(*pair, rule, error=error))
            else:
                offers.append({side: search.offered() for side, search in searches.items()})
            del losses, searches, stats
    weighed = list(weights or [1.0] * len(layers))
    counts, predicted = counts_of(curves, weighed, num_kv_heads, budget, 1 + shared)
    if num_kv_heads is None:
        found = [_of_counts(each, count) for each, count in zip(offers, counts, strict=True)]
    plan = Plan(
        LOSS, merging, tuple(found), tuple(curves), weights=tuple(weighed), predicted=predicted
    )
    with new_folder(out) as unfinished:
        _write(model, plan, names, work, unfinished, progress)
        if processor is not None:
            processor.save_pretrained(unfinished)
    return plan


class _Stream:
    """Texts on their way through the blocks.

    Attributes:
        states: for each batch the input ``[B, S, d]`` of the next block.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        inputs: list[dict[str, Tensor]],
        record: Callable[[Mapping[str, Tensor]], list[AttentionSample]],
    ):
        if not inputs:
            raise ValueError("batches must hold at least one batch, got none")
        self.blocks, self.inputs, self._record = blocks, inputs, record
        self.states: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        base: Any = model.base_model
        for batch in inputs:
            with _not_run(blocks) as calls:
                options = {} if "pixel_values" in batch else {"use_cache": False}
                base(**batch, **options)
            self.states.append(calls[0][0][0])
            self._calls.append([(args[1:], kwargs) for args, kwargs in calls])
        release(model.parameters())

    def moments(self, layer: AttentionLayer) -> LayerStats:
        """Run the layer's block; the moments of the layer's input."""
        sums = Sums()

        def collect(_: nn.Module, args: tuple, kwargs: dict) -> None:
            (states,) = attention_inputs(layer, args, kwargs).values()
            sums.add(states, token_mask(self._now, layer.stack.mask, states), layer.index)

        hook = layer.module.register_forward_pre_hook(collect, with_kwargs=True)
        try:
            self.attention(layer)
        finally:
            hook.remove()
        return sums.finish()

    def attention(self, layer: AttentionLayer) -> AttentionSample:
        """Run the layer's block; what its attention computed."""
        for batch, states in enumerate(self.states):
            self._now = self.inputs[batch]
            samples = self._record(self._now)
            args, kwargs = self._calls[batch][layer.index]
            out = self.blocks[layer.index](states, *args, **kwargs)
            self.states[batch] = out[0] if isinstance(out, tuple) else out
        found = samples[layer.index]
        samples[layer.index] = AttentionSample()
        return found


@contextmanager
def _not_run(blocks: list[nn.Module]) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Blocks return their input; yields the arguments that each was called with."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(((states, *args), kwargs))
        return states

    for block in blocks:
        block.forward = forward
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _of_counts(offered: dict[str, dict[int, SearchResult]], count: dict[str, int]) -> LayerPlan:
    chosen = [results[count[side]] for side, results in offered.items()]
    return LayerPlan(chosen[0], chosen[-1], "free")


def _moments(work: Path, layer: AttentionLayer) -> Path:
    return work / f"moments-{layer.index:05}.safetensors"


def _drop(module: nn.Module) -> None:
    release(module.parameters())


def _names(model: nn.Module, folder: Path) -> list[str]:
    """The names of the weights in the checkpoint's files, which must be those of the modules."""
    from safetensors import safe_open

    names: list[str] = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    other = sorted(set(names) - set(model.state_dict()))
    if other:
        raise NotImplementedError(
            f"weights in {folder} must have the names that the model's modules have, got "
            f"{other[0]}; use plan and convert"
        )
    return names


def _write(
    model: nn.Module, plan: Plan, names: list[str], work: Path, out: Path, progress: bool
) -> None:
    """Merge the layers one by one, and write a shard for each and one for everything else."""
    from safetensors.torch import load_file, save_file

    family, blocks, layers = family_of(model), attention_blocks(model), attention_layers(model)
    set_maps(model, family, plan.maps)
    guard(model.config)
    save: Any = model.save_pretrained
    save(out, state_dict={})  # the config; it would delete shards written before
    for extra in (out / WEIGHTS, out / INDEX):
        extra.unlink(missing_ok=True)
    prefixes = {id(module): f"{name}." for name, module in model.named_modules()}
    blocks_of = {prefixes[id(block)]: block for block in blocks}
    total = len(layers) + 1
    places: dict[str, str] = {}
    size = 0

    def shard(number: int, tensors: dict[str, Tensor]) -> Path:
        nonlocal size
        path = out / WEIGHTS.replace(".", f"-{number:05}-of-{total:05}.")
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, path.name))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        return path

    state = model.state_dict()
    rest = [n for n in names if not n.startswith(tuple(blocks_of))]
    shard(1, {name: state[name] for name in rest})
    release(state.values())
    del state
    for layer in track(layers, "Converting layers", shown=progress):
        (stats,) = load_stats(_moments(work, layer))
        merge = partial(merge_layer, layer_weights(layer), *plan.maps[layer.index])
        merged = merge(method=plan.merging, moments=stats, query_moments=stats.query)
        write_layer(layer.module, layer.output, family, merged)
        block = blocks[layer.index]
        prefix = prefixes[id(block)]
        kept = {f"{prefix}{n}": t for n, t in block.state_dict().items() if prefix + n in names}
        path = shard(layer.index + 2, kept)
        # From here on the block's weights, too, are views of a file.
        block.load_state_dict(
            {n.removeprefix(prefix): t for n, t in load_file(path).items()},
            strict=False,
            assign=True,
        )
        release([*kept.values(), stats.second_moment, *block.parameters()])
        del merged, merge, kept, stats
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (out / INDEX).write_text(json.dumps(index, indent=1))
