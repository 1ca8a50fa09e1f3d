"""DTensor: how the attention ops may be sharded over a device mesh.

After :func:`register`, :func:`gqa_kernels.asym_gqa_attention` takes DTensors as q, k and v::

    register()
    with implicit_replication():  # of torch.distributed.tensor.experimental: maps are plain tensors
        out = asym_gqa_attention(q, k, v, head_map, causal=True)
        out.sum().backward()

Along each dim of the mesh the placement may be one of these:

- q, k and v are sharded along the batch.
- q is sharded along its heads; k and v are replicated. Each rank takes its part of the map, whose
  entries are indices of KV heads. Gradients of k and v are then partial sums. Triton's op can't do
  this, because it reads a plan of the whole map.
- q is sharded along its tokens; k and v are replicated. This requires that positions don't matter:
  no causality, window or ALiBi.
- All are replicated.

Any other placement, including K and V sharded along their heads, is correct, but DTensor gathers
the tensors first: a map doesn't say on which rank a KV head is. To keep only each rank's own KV
heads, split the map (:meth:`gqa_kernels.HeadMap.shard`) and call the function on local tensors, as
:mod:`.tensor` does. Dropout is refused, because all ranks would drop the same elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..backends.dispatch import BACKENDS
from ..call.options import UNBOUNDED
from ..native import build
from ..native.schema import BACKWARD, FORWARD, Schema

OLDEST = "2.10"  # oldest torch release that was tested

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
    """One way to shard a call along one dim of the mesh: a placement for each kind of tensor.

    Attributes:
        q: placement of q, out, LSE and their gradients.
        kv: of k and v; ``dkv`` of their gradients.
        maps: of the head maps ``[Hq]``.
        slopes: of ALiBi slopes ``[B, Hq]`` and their gradient.
        sinks: of sinks ``[Hq]``; ``dsinks`` of their gradient.
        mask: of the mask ``[B, Hq, Sq, Sk]``.
        lengths: of lengths ``[B, Hk]``.
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
    """Register the sharding rules of the ops that this machine can run. Calling it again is
    harmless.

    Returns:
        the names of the backends whose ops now have rules.

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


# The field of Way that each tensor argument of an op follows. All others are absent or replicated.
_PLACED_AS = {
    "q": "q", "out": "q", "lse": "q", "dout": "q", "dlse": "q", "k": "kv", "v": "kv",
    "head_map": "maps", "plan": "maps", "value_head_map": "maps", "alibi_slopes": "slopes",
    "sinks": "sinks", "attn_mask": "mask", "key_ranges": "mask", "kv_lengths": "lengths",
}  # fmt: skip


def _register(name: str, forward_schema: Schema, backward_schema: Schema, cuts_map: bool) -> None:
    """The rules of ``name``'s forward and backward op.

    Args:
        cuts_map: whether the op reads the map itself, which can be sharded with the query heads.
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
    """Placements of a call's tensors, in order; None for absent tensors."""
    return [
        None if x is None or name not in _PLACED_AS else getattr(way, _PLACED_AS[name])
        for name, x in call._asdict().items()
    ]


def _ways(cuts_map: bool, call: Any) -> list[Way]:
    """The placements with which ranks need no communication."""
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
