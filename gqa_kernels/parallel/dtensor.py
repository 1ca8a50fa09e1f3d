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
:mod:`.tensor` does. Dropout is refused: ranks would drop alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..backends.dispatch import BACKENDS
from ..call.options import UNBOUNDED
from ..native import build
from ..native.schema import BACKWARD, FORWARD, Schema

OLDEST = "2.10"  # of torch, first release tested

try:
    from torch.distributed.tensor import Partial, Placement, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding
except ImportError as error:
    raise ImportError(
        f"gqa_kernels.parallel.dtensor needs torch >= {OLDEST}, built with torch.distributed "
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

    Examples:
        >>> register()
        >>> q, k, v = (distribute_tensor(x, mesh, [Shard(0)]) for x in (q, k, v))
        >>> out = asym_gqa_attention(q, k, v, head_map)
    """
    registered = []
    if any(not BACKENDS[name].unavailable_reason() for name in ("cpu", "cuda")):
        build.load()
        _register("attention", FORWARD, BACKWARD, cuts_map=True)
        registered += [n for n in ("cpu", "cuda") if not BACKENDS[n].unavailable_reason()]
    if BACKENDS["triton"].unavailable_reason() is None:
        from ..backends.triton import ops  # defines the ops

        _register("triton_attention", ops.FORWARD, ops.BACKWARD, cuts_map=False)
        registered.append("triton")
    return registered


# How a tensor of an op is cut: the field of its Way. All others are not given, or whole.
_PLACED_AS = {
    "q": "q", "out": "q", "lse": "q", "dout": "q", "dlse": "q", "k": "kv", "v": "kv",
    "head_map": "maps", "plan": "maps", "value_head_map": "maps", "alibi_slopes": "slopes",
    "sinks": "sinks", "attn_mask": "mask", "kv_lengths": "lengths",
}  # fmt: skip


def _register(name: str, forward_schema: Schema, backward_schema: Schema, cuts_map: bool) -> None:
    """Rules of ``name``'s forward and backward op.

    Args:
        cuts_map: whether the op reads the map itself, which can be cut with the query heads.
    """

    def forward(*arguments):
        call = forward_schema.Arguments(*arguments)
        _refuse_dropout(call.dropout_p)
        return [
            ([way.q, way.q], _placements(way, call)[: len(arguments)])
            for way in _ways(cuts_map, call)
        ]

    def backward(*arguments):
        call = backward_schema.Arguments(*arguments)
        return [
            (
                [
                    way.q, way.dkv, way.dkv, way.slopes if call.need_slopes else WHOLE,
                    way.dsinks if call.need_sinks else WHOLE,
                ],
                _placements(way, call)[: len(arguments)],
            )
            for way in _ways(cuts_map, call)
        ]  # fmt: skip

    for suffix, rule in (("forward", forward), ("backward", backward)):
        op = getattr(torch.ops.gqa_kernels, f"{name}_{suffix}").default
        register_sharding(op)(rule)


def _placements(way: Way, call: Any) -> list[Placement | None]:
    """Placements of the tensors of a call, in order; None of what is none."""
    return [
        None if x is None or name not in _PLACED_AS else getattr(way, _PLACED_AS[name])
        for name, x in call._asdict().items()
    ]


def _ways(cuts_map: bool, call: Any) -> list[Way]:
    """The ways in which ranks can work alone."""
    names = ["whole", "batch"]
    if cuts_map:
        names.append("heads")
    if call.alibi_slopes is None and call.window_left == call.window_right == UNBOUNDED:
        names.append("tokens")
    return [WAYS[name] for name in names]


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(
            f"dropout_p must be 0 for DTensors: ranks would drop alike, got {dropout_p}"
        )
