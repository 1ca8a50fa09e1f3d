"""DTensor: how the attention ops may be sharded over a device mesh.

After :func:`register`, :func:`gqa_kernels.asym_gqa_attention` takes DTensors as q, k and v::

    register()
    with implicit_replication():  # of torch.distributed.tensor.experimental: maps are plain tensors
        out = asym_gqa_attention(q, k, v, head_map, causal=True)
        out.sum().backward()

Along each dim of the mesh q, k and v may be

- cut along the batch, all three;
- q cut along its heads, k and v whole: the map's entries are numbers of KV heads, so each rank
  takes its part of the map (gradients of k and v are then partial sums). Triton's op reads a plan
  of the whole map and can't;
- q cut along its tokens, k and v whole, where no position counts: no causality, window or ALiBi;
- whole.

Anything else, K and V cut along their heads among it, is correct but gathered first, as DTensor
does: a map says nothing about where a KV head lies. To keep each rank's own KV heads only, cut the
map (:meth:`gqa_kernels.HeadMap.shard`) and call the function on local tensors, as
:mod:`.tensor_parallel` does. Dropout is refused: ranks would drop alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.dispatch import BACKENDS
from ..inputs import UNBOUNDED

OLDEST = "2.10"  # of torch, first release tested

try:
    from torch.distributed.tensor import Partial, Placement, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding
except ImportError as error:
    raise ImportError(
        f"gqa_kernels.integrations.dtensor needs torch >= {OLDEST}, built with torch.distributed "
        f"(pip install 'torch>={OLDEST}'): found {torch.__version__}: {error}"
    ) from error

WHOLE, SUM = Replicate(), Partial()


@dataclass(frozen=True)
class Way:
    """One way to cut a call along one dim of the mesh: a placement for each kind of tensor.

    Attributes:
        q: of q, out, LSE and their gradients.
        kv: of k and v; ``dkv`` of their gradients.
        maps: of the head maps ``[Hq]``.
        slopes: of ALiBi slopes ``[B, Hq]`` and their gradient.
        sinks: ``[Hq]``; ``dsinks`` of their gradient.
        mask: ``[B, Hq, Sq, Sk]``.
        lengths: ``[B, Hk]``.
    """

    q: Placement
    kv: Placement
    dkv: Placement
    maps: Placement
    slopes: Placement
    sinks: Placement
    dsinks: Placement
    mask: Placement
    lengths: Placement


WAYS = {
    "whole": Way(WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE),
    "batch": Way(Shard(0), Shard(0), Shard(0), WHOLE, Shard(0), WHOLE, SUM, Shard(0), Shard(0)),
    "heads": Way(Shard(1), WHOLE, SUM, Shard(0), Shard(1), Shard(0), Shard(0), Shard(1), WHOLE),
    "tokens": Way(Shard(2), WHOLE, SUM, WHOLE, WHOLE, WHOLE, SUM, Shard(2), WHOLE),
}


def register() -> list[str]:
    """Tell DTensor the rules of the ops that this machine can run; more than one call does no harm.

    Returns:
        names of the backends whose ops now have rules.
    """
    registered = []
    if any(not BACKENDS[name].unavailable_reason() for name in ("cpu", "cuda")):
        from ..native import build

        build.load()
        _register("attention", cuts_map=True)
        registered += [n for n in ("cpu", "cuda") if not BACKENDS[n].unavailable_reason()]
    if BACKENDS["triton"].unavailable_reason() is None:
        from ..backends.triton import backward_ops  # noqa: F401  (defines both ops)

        _register("triton_attention", cuts_map=False)
        registered.append("triton")
    return registered


def _register(name: str, cuts_map: bool) -> None:
    """Rules of ``name``'s forward and backward op; their arguments are those of
    :mod:`gqa_kernels.autograd`.

    Args:
        cuts_map: whether the op reads the map itself, which can be cut with the query heads.
    """

    def forward(q, k, v, *others):
        _refuse_dropout(others[NUM_BEFORE_DROPOUT + 1 :])
        return [
            ([way.q, way.q], [way.q, way.kv, way.kv, *_of_others(way, others)])
            for way in _ways(cuts_map, others)
        ]

    def backward(dout, dlse, q, k, v, out, lse, *others):
        *others, need_slopes, need_sinks = others
        return [
            (
                [
                    way.q, way.dkv, way.dkv, way.slopes if need_slopes else WHOLE,
                    way.dsinks if need_sinks else WHOLE,
                ],
                [
                    way.q, None if dlse is None else way.q, way.q, way.kv, way.kv, way.q, way.q,
                    *_of_others(way, others), None, None,
                ],
            )
            for way in _ways(cuts_map, others)
        ]  # fmt: skip

    for suffix, rule in (("forward", forward), ("backward", backward)):
        op = getattr(torch.ops.gqa_kernels, f"{name}_{suffix}").default
        register_sharding(op)(rule)


NUM_BEFORE_DROPOUT = 10  # maps, biases, scale, windows and softcap


def _of_others(way: Way, others: Sequence[Any]) -> list[Placement | None]:
    """Placements of the maps, slopes, sinks, mask and lengths that there are; None of the rest."""
    tensors = [way.maps, way.maps, way.slopes, way.sinks, way.mask, way.lengths]
    placed = [None if x is None else p for x, p in zip(others, tensors, strict=False)]
    return placed + [None] * (len(others) - len(placed))


def _ways(cuts_map: bool, others: Sequence[Any]) -> list[Way]:
    """The ways in which ranks can work alone."""
    slopes, (window_left, window_right) = others[2], others[7:9]
    names = ["whole", "batch"]
    if cuts_map:
        names.append("heads")
    if slopes is None and window_left == window_right == UNBOUNDED:
        names.append("tokens")
    return [WAYS[name] for name in names]


def _refuse_dropout(options: Sequence[Any]) -> None:
    """``options``: dropout_p and its seed, where the call gives them."""
    if options and options[0]:
        raise NotImplementedError(
            f"dropout_p must be 0 for DTensors: ranks would drop alike, got {options[0]}"
        )
