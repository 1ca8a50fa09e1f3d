"""Measured losses: what merging a group of query heads does to a layer's attention output.

``sample_attention`` records the queries, keys and values of every attention layer on some tokens.
``MergeLosses`` merges one group of one side (K or V), runs the attention of the group's query heads
again, and measures the squared change of the layer's output, softmax included. This is the number
that ``search_groups`` minimises.

Merging is a linear map of a group's old heads that commutes with the rotation by position, so it is
applied to recorded keys, rotation included. If an RMS norm follows K, merged keys are scaled to the
old keys' norm, which is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import asym_gqa_attention
from ..attention import attention_call as checked_call
from ..backends.reference.formula import visibility
from ..call.attention import AttentionCall
from ..grouping.calibration import LayerStats
from ..grouping.low_rank import pair_estimates
from ..grouping.merging import check_merging, merge_group
from ..grouping.search.group_costs import EXHAUSTIVE_HEADS
from ..grouping.space import HeadSpace
from ..head_map import HeadMap
from ..integrations.transformers import attention_call
from ..integrations.transformers.guards import reads_maps
from ..models.families import attention_layers, layer_weights
from ..models.inputs import Batch, model_inputs, token_mask
from ..models.weights import LayerWeights
from ..reporting.progress import track

_RECORDER = "asym_gqa_recorder"
_KEPT_CHANGES = 2  # per query head
_KEPT_MERGERS = 128
_SCALED_BY = 8  # pairs measured for the scale of the others' estimates
SIDES = ("k", "v")
Group = tuple[int, ...]  # query heads, ascending


@dataclass
class AttentionSample:
    """What one attention layer computed on some batches.

    Attributes:
        calls: the arguments of ``asym_gqa_attention``, one dict a batch; layout ``"bshd"``.
        masks: ``[B, Sq]`` of each batch, True for query tokens that are not padding.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def sample_attention(
    model: nn.Module, batches: Iterable[Batch], *, progress: bool = False
) -> list[AttentionSample]:
    """Record the attention of every layer.

    Args:
        model: a Hugging Face model of a known family.
        batches: as ``calibrate`` takes them. Everything recorded stays in memory: three numbers of
            the width of K per token and layer, so a few thousand tokens are right.
        progress: show a bar if standard error is a terminal.

    Returns:
        One sample per attention layer.

    Raises:
        ValueError: no batch.
    """
    samples: list[AttentionSample] = []
    with recording(model) as record:
        for batch in track(batches, "Recording attention", shown=progress):
            inputs = model_inputs(model, batch)
            options = {} if "pixel_values" in inputs else {"use_cache": False}
            samples = record(inputs)
            model.base_model(**inputs, **options)
    if not samples:
        raise ValueError("batches must hold at least one batch, got none")
    return samples


@contextmanager
def recording(
    model: nn.Module,
) -> Iterator[Callable[[Mapping[str, Tensor]], list[AttentionSample]]]:
    """Record what attention layers compute while they run. ``record(inputs)`` tells which inputs
    of the model run next, and returns the samples of all layers; remove calls from them to free
    their memory."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    layers = attention_layers(model)
    index = {id(layer.module): layer for layer in layers}
    samples = [AttentionSample() for _ in layers]
    inputs: dict[str, Tensor] = {}

    def attention(module, query, key, value, attention_mask, **options):
        call = attention_call(module, query, key, value, attention_mask, **options)
        call["dropout_p"] = 0.0
        layer = index[id(module)]
        samples[layer.index].calls.append(call)
        samples[layer.index].masks.append(token_mask(inputs, layer.stack.mask, call["q"]))
        return asym_gqa_attention(**call, backend="reference"), None

    def record(new: Mapping[str, Tensor]) -> list[AttentionSample]:
        inputs.clear()
        inputs.update(new)
        return samples

    AttentionInterface.register(_RECORDER, reads_maps(attention))
    AttentionMaskInterface.register(_RECORDER, sdpa_mask)
    before, training = model.config._attn_implementation, model.training
    try:
        model.eval()
        model.set_attn_implementation(_RECORDER)
        yield record
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def losses_of(
    model: nn.Module,
    stats: Sequence[LayerStats] | None,
    held_out: Iterable[Batch],
    merging: str = "low_rank",
    *,
    queries: int = 4096,
    seed: int = 0,
    progress: bool = False,
) -> list[MergeLosses]:
    """The losses of every layer of a model; arguments as for ``MergeLosses``."""
    samples = sample_attention(model, held_out, progress=progress)
    return [
        MergeLosses(
            layer_weights(layer),
            samples[layer.index],
            None if stats is None else stats[layer.index],
            merging,
            queries=queries,
            seed=seed,
        )
        for layer in attention_layers(model)
    ]


class MergeLosses:
    """Losses of one layer. ``losses("k", heads)`` is the loss of merging the K heads that some
    query heads read, everything else left alone; ``losses.joint(key_map, value_map)`` that of both
    maps together.

    A loss is the mean squared change of the attention output over that output's variance, as
    ``grouping.layer_errors`` measures it on a converted model.

    Attributes:
        num_heads: query heads.
        variance: mean squared deviation of the attention output, summed over its dims.

    Args:
        weights: the layer.
        sample: of it, on tokens that were not used for ``stats``.
        stats: of ``calibrate``; what merging computes from.
        merging: a method of ``convert``.
        queries: query tokens to measure on, drawn at random from the sample if it has more.
        seed: of the draw.

    Raises:
        ValueError: a merging that keeps nothing of the old heads (``"random"``), or no variance.

    Example::

        losses = losses_of(model, stats, held_out)[0]
        search_groups(lambda heads: losses("v", heads), losses.num_heads, 3)
    """

    def __init__(
        self,
        weights: LayerWeights,
        sample: AttentionSample,
        stats: LayerStats | None,
        merging: str = "low_rank",
        *,
        queries: int = 4096,
        seed: int = 0,
    ):
        check_merging(merging)
        if merging in ("none", "random"):
            raise ValueError(f"merging must combine old heads to have a loss, got {merging!r}")
        self.merging, self.num_heads = merging, weights.num_heads
        self._normed = weights.k_norm is not None
        query = None if stats is None else stats.query
        self._spaces = {side: HeadSpace.of(weights, side, stats, query) for side in SIDES}
        kept = _kept(sample.masks, queries, seed)
        self._batches = [
            _Batch(call, each) for call, each in zip(sample.calls, kept, strict=True) if each.any()
        ]
        self._o = weights.o.detach().float().cpu()  # [d_out, Hq, Dv]
        o = self._o.flatten(1)
        self._metric = o.T @ o
        self._head_dim = weights.o.shape[2]
        self.tokens = sum(len(batch.outputs) for batch in self._batches)
        heads = torch.cat([batch.outputs.flatten(1) for batch in self._batches])
        self.variance = self._squared(heads - heads.mean(0), range(self.num_heads)) / self.tokens
        if not self.variance > 0:
            raise ValueError("attention outputs must vary over the sample, got one constant")
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}
        self._joint: dict[tuple[HeadMap, HeadMap], float] = {}
        # The latest, oldest first:
        self._changes: dict[tuple[int, Group, Group], Tensor] = {}
        self._mergers: dict[tuple[str, Group], Callable[[_Batch], Tensor]] = {}

    def __call__(self, side: str, query_heads: Sequence[int]) -> float:
        heads = tuple(query_heads)
        if (side, heads) not in self._known:
            self._known[side, heads] = self._measure(side, heads)
        return self._known[side, heads]

    def old_heads(self, side: str) -> HeadMap:
        """The KV head of a side that each query head reads before merging."""
        return self._spaces[side].head_map

    def can_estimate(self, side: str) -> bool:
        """Whether second moments estimate the losses of pairs."""
        spaces = [self._spaces[each] for each in (SIDES if side == "shared" else (side,))]
        return self.merging == "low_rank" and all(space.symmetry.scalable for space in spaces)

    def pairs(self, side: str) -> np.ndarray:
        """``[Hq, Hq]`` losses of groups of two query heads, for many heads estimated from second
        moments if it ``can_estimate`` them."""
        if side == "shared":
            return self.pairs("k") + self.pairs("v")
        first, second = np.triu_indices(self.num_heads, 1)
        every = list(zip(first.tolist(), second.tolist(), strict=True))
        found = np.zeros((self.num_heads, self.num_heads))
        if self.num_heads > EXHAUSTIVE_HEADS and self.can_estimate(side):
            estimates = pair_estimates(self._spaces[side]).numpy()[first, second]
            spread = np.linspace(0, len(every) - 1, _SCALED_BY).astype(int)
            chosen = np.argsort(estimates, kind="stable")[spread]
            measured = sum(self(side, every[i]) for i in chosen)
            total = estimates[chosen].sum()
            found[first, second] = estimates * (measured / total if total > 0 else 0.0)
        else:
            found[first, second] = [self(side, pair) for pair in every]
        return found + found.T

    def shared(self, query_heads: Sequence[int]) -> float:
        """The losses of K and of V added: the cost of a group if both have one map."""
        return self("k", query_heads) + self("v", query_heads)

    @torch.no_grad()
    def joint(self, key_map: HeadMap, value_map: HeadMap) -> float:
        """The loss of both maps together, with what K and V and different groups add up to."""
        if (key_map, value_map) not in self._joint:
            self._joint[key_map, value_map] = self._measure_both(key_map, value_map)
        return self._joint[key_map, value_map]

    def _measure_both(self, key_map: HeadMap, value_map: HeadMap) -> float:
        keys = [
            (h, tuple(key_map.groups[k]), tuple(value_map.groups[v]))
            for h, (k, v) in enumerate(zip(key_map, value_map, strict=True))
        ]
        # Maps that a search tries differ in two groups: the other heads are known.
        self._add_changes([key for key in keys if key not in self._changes])
        total = sum(self._changes[key] for key in keys)
        for key in keys:
            self._changes[key] = self._changes.pop(key)
        while len(self._changes) > _KEPT_CHANGES * self.num_heads:
            del self._changes[next(iter(self._changes))]
        return float(total.double().square().sum()) / self.tokens / self.variance

    def _add_changes(self, keys: list[tuple[int, Group, Group]]) -> None:
        """What query heads put into the layer's output more or less, ``[N, d_out]`` each, if their
        groups of K and of V are merged."""
        if not keys:
            return
        heads = [h for h, *_ in keys]
        mergers = {
            side: {group: self._merger(side, group) for _, *groups in keys for group in [groups[i]]}
            for i, side in enumerate(SIDES)
        }
        changed = []
        for batch in self._batches:
            sides = []
            for i, side in enumerate(SIDES):
                merged = {group: merger(batch) for group, merger in mergers[side].items()}
                sides.append(
                    torch.stack(
                        [merged[key[1 + i]][:, :, key[1 + i].index(key[0])] for key in keys], 2
                    )
                )
            changed.append(batch.attend(heads, *sides) - batch.outputs[:, heads])
        outputs = torch.einsum("nhd,ohd->hno", torch.cat(changed), self._o[:, heads])
        self._changes.update(zip(keys, outputs, strict=True))

    @torch.no_grad()
    def _measure(self, side: str, heads: tuple[int, ...]) -> float:
        if len({self._spaces[side].head_map[h] for h in heads}) == 1:
            return 0.0
        merger, changes = self._merger(side, heads), []
        for batch in self._batches:
            new = merger(batch)
            if side == "v":
                changes.append(batch.weigh(heads, new - batch.of(side, heads)))
            else:
                changes.append(batch.attend(heads, new) - batch.outputs[:, list(heads)])
        return self._loss(changes, heads)

    def _loss(self, changes: list[Tensor], heads: Sequence[int]) -> float:
        """From what query heads put out more or less, ``[N, n, Dv]`` of each batch."""
        changed = torch.cat(changes).flatten(1)
        return self._squared(changed, heads) / self.tokens / self.variance

    def _squared(self, heads: Tensor, query_heads: Sequence[int]) -> float:
        """Sum over tokens of the squared output that ``heads [N, n * Dv]`` of some query heads
        make."""
        dims = torch.arange(self._head_dim)
        index = torch.cat([h * self._head_dim + dims for h in query_heads])
        return float(((heads.T @ heads) * self._metric[index[:, None], index]).double().sum())

    def _merger(self, side: str, heads: Group) -> Callable[[_Batch], Tensor]:
        """What query heads of a group read after merging, ``[B, Sk, n, D]``, for each batch."""
        merger = self._mergers.pop((side, heads), None) or self._new_merger(side, heads)
        self._mergers[side, heads] = merger
        if len(self._mergers) > _KEPT_MERGERS:
            del self._mergers[next(iter(self._mergers))]
        return merger

    def _new_merger(self, side: str, heads: Group) -> Callable[[_Batch], Tensor]:
        # A merger must not refer to the losses that keep it: such a cycle outlives them by long.
        space, normed = self._spaces[side], self._normed
        if len({space.head_map[h] for h in heads}) == 1:
            return lambda batch: batch.of(side, heads)
        group, merged = merge_group(space, heads, self.merging)
        encoders = merged.encoders.float().transpose(1, 2).flatten(0, 1)  # [m D, D] of m old heads
        decoders = None
        if merged.decoders is not None:
            places = [group.heads.index(space.head_map[h]) for h in heads]
            decoders = merged.decoders.float()[places].flatten(0, 1)  # [n D, D]

        def merge(batch: _Batch) -> Tensor:
            shared = batch.old(side, group.heads).flatten(2) @ encoders
            if decoders is None:
                new = shared[:, :, None].expand(-1, -1, len(heads), -1)
            else:
                new = (shared @ decoders.T).unflatten(2, (len(heads), -1))
            if side == "k" and normed:
                norm = batch.of(side, heads).norm(dim=-1, keepdim=True)
                new = new * (norm / new.norm(dim=-1, keepdim=True))
            return new

        return merge


class _Batch:
    """One recorded call in fp32 on the CPU, some of its query tokens only.

    Attributes:
        outputs: ``[N, Hq, Dv]`` of the query tokens kept.
    """

    def __init__(self, call: dict[str, Any], kept: Tensor):
        """``kept [B, Sq]``: the query tokens to keep."""
        checked = checked_call(**call)
        options = checked.options
        self.scale, self.softcap = checked.scale, options.softcap
        self.maps = {
            "k": call["head_map"],
            "v": call["head_map"] if call["value_head_map"] is None else call["value_head_map"],
        }
        self.kv = {side: call[side].detach().float().cpu() for side in SIDES}
        # Rows of one sequence are padded to the most that any has; the padding is cut at the end.
        self.most = int(kept.sum(1).max())
        order = kept.int().argsort(dim=1, descending=True, stable=True)[:, : self.most].cpu()
        self.filled = kept.cpu().gather(1, order)  # [B, n]
        self.q = _rows(call["q"].detach().float().cpu(), order, 1)  # [B, n, Hq, D]
        self.bias = _rows(_bias(checked).cpu(), order, 2)  # [B, 1 or Hq, n, Sk]
        self.sinks = None if call["sinks"] is None else call["sinks"].detach().float().cpu()
        every = range(self.q.shape[2])
        self.probabilities = self._probabilities(every, self.of("k", every))  # [B, Hq, n, Sk]
        self.outputs = self.weigh(every, self.of("v", every))

    def old(self, side: str, heads: Sequence[int]) -> Tensor:
        """Recorded KV heads, ``[B, Sk, n, D]``."""
        return self.kv[side][:, :, list(heads)]

    def of(self, side: str, query_heads: Sequence[int]) -> Tensor:
        """What query heads read, ``[B, Sk, n, D]``."""
        return self.old(side, [self.maps[side][h] for h in query_heads])

    def weigh(self, query_heads: Sequence[int], values: Tensor) -> Tensor:
        """``[N, n, Dv]``: values ``[B, Sk, n, Dv]`` weighed by the recorded probabilities."""
        shares = self.probabilities[:, list(query_heads)]
        return (shares @ values.transpose(1, 2)).transpose(1, 2)[self.filled]

    def attend(self, query_heads: Sequence[int], k: Tensor, v: Tensor | None = None) -> Tensor:
        """``[N, n, Dv]``: attention of some query heads with other keys (and values)."""
        v = self.of("v", query_heads) if v is None else v
        shares = self._probabilities(query_heads, k)
        return (shares @ v.transpose(1, 2)).transpose(1, 2)[self.filled]

    def _probabilities(self, query_heads: Sequence[int], k: Tensor) -> Tensor:
        heads = list(query_heads)
        scores = self.q[:, :, heads].transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores + (self.bias if self.bias.shape[1] == 1 else self.bias[:, heads])
        if self.sinks is None:
            return scores.softmax(-1).nan_to_num(0)  # a row without keys has nan
        sinks = self.sinks[heads][:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def _bias(call: AttentionCall) -> Tensor:
    """``[B, 1 or Hq, Sq, Sk]``: what is added to the scores, -inf for keys that are not seen."""
    mask = call.attn_mask
    one = slice(None) if mask is not None and mask.dim() == 4 and mask.shape[1] > 1 else slice(1)
    _, visible = visibility(call, call.head_map_tensor.long())
    bias = torch.zeros_like(visible[:, one], dtype=torch.float32)
    if mask is not None and mask.dtype != torch.bool:
        bias = bias + mask.float()
    return bias.masked_fill(~visible[:, one], -torch.inf)


def _rows(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    """Query tokens ``order [B, n]`` of a tensor ``[B, ...]`` that has them in ``dim``."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = order.shape
    size = list(tensor.shape)
    size[0], size[dim] = order.shape
    tensor = tensor.expand(len(order), *tensor.shape[1:])
    return tensor.gather(dim, order.view(shape).expand(size))


def _kept(masks: Sequence[Tensor], queries: int, seed: int) -> list[Tensor]:
    """The masks with at most ``queries`` random tokens left in all."""
    total = sum(int(mask.sum()) for mask in masks)
    if total <= queries:
        return list(masks)
    chosen = torch.zeros(total, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    chosen[torch.randperm(total, generator=generator)[:queries]] = True
    kept = []
    for mask in masks:
        count = int(mask.sum())
        each = torch.zeros_like(mask, device="cpu")
        each[mask.cpu()] = chosen[:count]
        chosen = chosen[count:]
        kept.append(each)
    return kept
