"""Ring attention: K and V of all ranks go around while each rank attends to what it holds.

Tokens form runs of consecutive positions in the whole sequence. A run of queries and a run of keys
that see each other make a :class:`Part`: one ordinary call on the tokens of both. Its window,
counted from the last key as in the kernels, determines what is visible. The outputs of the parts
are merged through their LSEs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import asym_gqa_attention
from ..cache.tensors import Layout
from ..cascade import merge_attention_states, over_heads_and_tokens

Range = tuple[int, int]  # positions [begin, end) in the whole sequence
Ranges = Sequence[Sequence[Range]]  # for each rank, the ranges of its tokens, in order


@dataclass(frozen=True)
class Ring:
    """The ranks of a group. Each rank sends to the next one."""

    group: dist.ProcessGroup
    rank: int
    world: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ring:
        if not dist.is_initialized():
            raise ValueError(
                "torch.distributed must be initialised (init_process_group) for context parallelism"
            )
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group must hold this rank, got one that does not")
        return cls(group, rank, dist.get_world_size(group))

    def start(self, sent: Tensor, received: Tensor) -> list[dist.Work]:
        """Start sending one buffer and receiving another. Empty buffers are not sent."""
        peers = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        exchanges = ((dist.isend, sent, peers[0]), (dist.irecv, received, peers[1]))
        operations = [
            dist.P2POp(operation, buffer, dist.get_global_rank(self.group, peer), self.group)
            for operation, buffer, peer in exchanges
            if buffer.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class Call:
    """One call: the positions of the tokens, the visibility, and the options of every part.

    Attributes:
        queries: ranges of this rank's queries.
        keys: ranges of every rank's keys.
        left, right: number of keys visible before and after a query's position, None for all.
        axis: the axis of tokens in q, k and v.
    """

    ring: Ring
    queries: Sequence[Range]
    keys: Ranges
    left: int | None
    right: int | None
    alibi_slopes: Tensor | None
    axis: int
    layout: Layout
    options: dict[str, object]

    def num_keys(self, owner: int) -> int:
        return sum(end - begin for begin, end in self.keys[owner])

    def parts(self, owner: int) -> Iterator[Part]:
        """The pairs of runs of this rank's queries and ``owner``'s keys that see each other."""
        q_start = 0
        for q_begin, q_end in self.queries:
            k_start = 0
            for keys in self.keys[owner]:
                # ALiBi's bias is the kernel's own if the last query is at the last key.
                cut = q_end if self.alibi_slopes is None else min(max(keys[1], q_begin), q_end)
                for run in ((q_begin, cut), (cut, q_end)):
                    part = _visible(run, keys, self.left, self.right)
                    if part is not None:
                        yield part.moved(q_start - q_begin, k_start - keys[0])
                k_start += keys[1] - keys[0]
            q_start += q_end - q_begin

    def attend(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out and LSE of the part's queries over its keys, from the ranks' whole q, k and v."""
        cut = self.queries_of(part, q), self.keys_of(part, k), self.keys_of(part, v)
        return self.attend_to(part, *cut)

    def attend_to(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the part's tokens only."""
        slopes = self.alibi_slopes
        if slopes is None or part.distance == 0:
            return asym_gqa_attention(
                q, k, v, window=part.window, alibi_slopes=slopes, layout=self.layout,
                return_lse=True, **self.options,
            )  # fmt: skip
        # All keys come before the queries. So the bias -slope * (p - j) is the sum of a bias of the
        # keys, counted from the last one, and a bias of the queries, which only shifts the LSE.
        slopes = slopes.to(q.device, torch.float32)[..., None]
        num_keys, num_queries = k.shape[self.axis], q.shape[self.axis]
        before_last = torch.arange(1 - num_keys, 1, device=q.device)
        past_last = torch.arange(num_queries, device=q.device) + (part.distance - num_queries + 1)
        out, lse = asym_gqa_attention(
            q, k, v, window=part.window, attn_mask=(slopes * before_last)[..., None, :],
            layout=self.layout, return_lse=True, **self.options,
        )  # fmt: skip
        return out, lse - slopes * past_last

    def queries_of(self, part: Part, x: Tensor) -> Tensor:
        """The part's tokens of a tensor like q."""
        return x.narrow(self.axis, part.q_begin, part.q_end - part.q_begin)

    def keys_of(self, part: Part, x: Tensor) -> Tensor:
        """The part's tokens of a tensor like k."""
        return x.narrow(self.axis, part.k_begin, part.k_end - part.k_begin)

    def rows_of(self, part: Part, lse: Tensor) -> Tensor:
        """The part's queries of an LSE ``[B, Hq, Sq]``."""
        return lse[:, :, part.q_begin : part.q_end]


@dataclass(frozen=True)
class Part:
    """A run of queries and a run of keys.

    Attributes:
        window: the window of a call on these tokens alone, whose last query is at the last key.
        distance: how many positions the last query comes after the last key.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    window: tuple[int | None, int | None]
    distance: int

    def moved(self, queries: int, keys: int) -> Part:
        """The part, with indices into a rank's own tensors instead of positions."""
        return Part(
            self.q_begin + queries, self.q_end + queries, self.k_begin + keys, self.k_end + keys,
            self.window, self.distance,
        )  # fmt: skip


def _visible(queries: Range, keys: Range, left: int | None, right: int | None) -> Part | None:
    """The visible part of two runs, without the tokens at their ends that see nothing."""
    (q_begin, q_end), (k_begin, k_end) = queries, keys
    if q_begin >= q_end or k_begin >= k_end:
        return None
    if left is not None:
        k_begin = max(k_begin, q_begin - left)
    if right is not None:
        k_end = min(k_end, q_end + right)
        q_begin = max(q_begin, k_begin - right)
    if left is not None:
        q_end = min(q_end, k_end + left)
    if q_begin >= q_end or k_begin >= k_end:
        return None
    distance = q_end - k_end
    # Neither side is negative: the queries and keys that would make it so were cut off above.
    window = (
        None if left is None else left - distance,
        None if right is None else right + distance,
    )
    return Part(q_begin, q_end, k_begin, k_end, window, distance)


class RingAttention(torch.autograd.Function):
    """Attention over all ranks' keys, and its gradient.

    Forward passes K and V around the ring once. Backward does so again: it recomputes each part and
    differentiates it separately. With ``w = exp(lse_part - lse)``, the gradients of the part's out
    and LSE are ``w dout`` and ``w (dout . (out_part - out) + dlse)``.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(q.dtype, torch.float32)
        shape = q.shape if call.layout == "bhsd" else q.transpose(1, 2).shape
        lse = torch.full(shape[:3], -torch.inf, dtype=precise, device=q.device)
        state = torch.zeros((*q.shape[:3], v.shape[3]), dtype=precise, device=q.device)
        for owner, keys, values in _round(call, k, v):
            for part in call.parts(owner):
                rows, row_lse = call.queries_of(part, state), call.rows_of(part, lse)
                theirs = call.attend(part, q, keys, values)
                merged = merge_attention_states(rows, row_lse, *theirs, layout=call.layout)
                rows.copy_(merged[0])
                row_lse.copy_(merged[1])
        out = state.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call: Call = ctx.call
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        held = torch.zeros(k.numel() + v.numel(), dtype=lse.dtype, device=k.device)
        for owner, keys, values in _round(call, k, v):
            dk, dv = _unpacked(held, call, owner, k, v)
            for part in call.parts(owner):
                one = _part_gradients(call, part, (q, keys, values), out, lse, dout, dlse)
                call.queries_of(part, dq).add_(one[0])
                call.keys_of(part, dk).add_(one[1])
                call.keys_of(part, dv).add_(one[2])
            held = _pass_on(call, owner, held, k, v)
        dk, dv = _unpacked(held, call, call.ring.rank, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _part_gradients(
    call: Call,
    part: Part,
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the part's q, k and v. ``tensors`` are this rank's q and the held k and v."""
    cuts = (call.queries_of, call.keys_of, call.keys_of)
    leaves = [cut(part, x).detach().requires_grad_() for cut, x in zip(cuts, tensors, strict=True)]
    with torch.enable_grad():
        part_out, part_lse = call.attend_to(part, *leaves)
    out, dout = call.queries_of(part, out), call.queries_of(part, dout).to(lse.dtype)
    lse, dlse = call.rows_of(part, lse), call.rows_of(part, dlse)
    share = torch.exp(part_lse.detach() - lse.masked_fill(lse == -torch.inf, 0))
    delta = (dout * (part_out.detach().to(lse.dtype) - out.to(lse.dtype))).sum(-1)
    delta = delta.transpose(1, 2) if call.layout == "bshd" else delta
    part_dout = (over_heads_and_tokens(share, dout, call.layout) * dout).to(part_out.dtype)
    return torch.autograd.grad((part_out, part_lse), leaves, (part_dout, share * (delta + dlse)))


def _round(call: Call, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields ``(owner, its k, its v)`` for every rank, starting with this one. The next rank's keys
    arrive while the caller works on these."""
    ring = call.ring
    held = torch.cat([k.flatten(), v.flatten()]) if ring.world > 1 else None
    keys, values = k, v
    for step in range(ring.world):
        owner = (ring.rank - step) % ring.world
        if step + 1 == ring.world:
            yield owner, keys, values
            return
        following = (owner - 1) % ring.world
        coming = held.new_empty(_packed_size(call, following, k, v))
        works = ring.start(held, coming)
        yield owner, keys, values
        for work in works:
            work.wait()
        held = coming
        keys, values = _unpacked(held, call, following, k, v)


def _pass_on(call: Call, owner: int, held: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Send the gradients of ``owner``'s keys to the next rank, and return those received."""
    ring = call.ring
    if ring.world == 1:
        return held
    coming = held.new_empty(_packed_size(call, (owner - 1) % ring.world, k, v))
    for work in ring.start(held, coming):
        work.wait()
    return coming


def _packed_size(call: Call, owner: int, k: Tensor, v: Tensor) -> int:
    """Number of elements of ``owner``'s K and V."""
    return sum(_with_tokens(x, call, owner).numel() for x in (k, v))


def _unpacked(held: Tensor, call: Call, owner: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``owner``'s K and V as views of one buffer."""
    shapes = [_with_tokens(x, call, owner) for x in (k, v)]
    parts = held.split([shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _with_tokens(x: Tensor, call: Call, owner: int) -> torch.Size:
    """The shape of ``owner``'s k or v, given this rank's."""
    shape = list(x.shape)
    shape[call.axis] = call.num_keys(owner)
    return torch.Size(shape)
