"""AppendCall: new tokens to write behind the keys of a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..cache.tensors import Layout
from ..cache.view import KVView
from ..native.arguments import as_bool, check_tensors
from ..native.autograd import requires_grad
from . import checks
from .over_view import OverView
from .rotary import check_positions, positions_from, rotate


@dataclass(slots=True, eq=False)
class AppendCall(OverView):
    """New tokens in the form that backends take; made by :meth:`create`.

    Attributes:
        q: queries to rotate, ``[B, Hq, S, D]``, or None. Rotation makes a new tensor.
        k_new: ``[B, Hk, S, D]``; with ``new_offsets`` (then q and v_new too) ``[1, Hk, total, D]``.
        v_new: ``[B, Hv, S, Dv]``.
        kv: where to. Its lengths are those before the append: token ``i`` of a sequence goes to
            slot ``kv_begin + kv_lengths + i``. Tokens beyond the capacity, or in a page out of
            range, are dropped.
        new_offsets: int32 ``[B + 1]`` or None, as ``AttentionCall.q_offsets``.
        max_new: most new tokens of a sequence. It sizes grids and nothing else.
        rotary_cos, rotary_sin: ``[max_position, R / 2]`` or None: the first ``R`` columns of q and
            k_new are rotated by the angle of position ``kv_lengths + i``. Beyond the table the
            last row is taken.
        rotary_interleaved: pairs are columns ``(2i, 2i + 1)`` (GPT-J) and not ``(i, i + R / 2)``
            (GPT-NeoX).
        requires_grad: whether autograd would record the call.
    """

    q: Tensor | None
    k_new: Tensor
    v_new: Tensor
    kv: KVView
    new_offsets: Tensor | None = None
    max_new: int = 0
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False
    requires_grad: bool = False

    @classmethod
    def create(
        cls,
        k_new: Tensor,
        v_new: Tensor,
        view: KVView,
        *,
        q: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
        rotary_positions: Tensor | None = None,
        next_positions: Tensor | None = None,
        key_transform: Callable[[Tensor], Tensor] | None = None,
        layout: Layout = "bhsd",
        q_heads_first: Tensor | None = None,
    ) -> AppendCall:
        """The call of :meth:`gqa_kernels.cache.base.KVCache.append`, whose arguments these are,
        with room for every token. ``q_heads_first``: q as ``[B, Hq, S, D]``, in its place.
        ``next_positions``, ``key_transform``: of the cache; the latter copies the new keys."""
        packed = cu_seqlens is not None
        if packed:
            check_tensors(cu_seqlens=cu_seqlens)
        elif max_seqlen is not None:
            checks.check_longest("max_seqlen", max_seqlen)
        tensors = type(k_new) is type(v_new) is Tensor
        if packed or layout != "bhsd" or not (tensors and k_new.dim() == v_new.dim() == 4):
            k_new = checks.heads_first("k_new", k_new, layout, packed)
            v_new = checks.heads_first("v_new", v_new, layout, packed)
        q = q_heads_first if q is None else checks.heads_first("q", q, layout, packed)
        call = cls(
            q, k_new, v_new, view, cu_seqlens, k_new.shape[2], rotary_cos, rotary_sin,
            as_bool("rotary_interleaved", rotary_interleaved),
            torch.is_grad_enabled() and requires_grad(q, k_new, v_new),
        )  # fmt: skip
        if cu_seqlens is not None:
            call.check()
            call.new_offsets, call.max_new = checks.resolve_offsets(
                "cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, k_new, view.batch
            )
        elif q is not None and not (q.dtype == k_new.dtype and q.shape[2] == call.max_new):
            call.check()
        if view.num_k_heads != view.num_v_heads or rotary_cos is not None or rotary_sin is not None:
            call._check_positions(rotary_positions is not None or next_positions is not None)
            if key_transform is not None and rotary_positions is None and next_positions is None:
                next_positions = call._positions_by_length()
            call._rotate_at(rotary_positions, next_positions)
        elif rotary_positions is not None:
            raise ValueError("rotary_positions must be None without rotary_cos and rotary_sin")
        if key_transform is not None:
            call.check()
            call.k_new = key_transform(call.k_new)
        new = call.max_new if call.new_offsets is None else call.new_offsets
        if not view.has_slots(new):
            call.check()
            view.check_slots(new)
        return call

    @classmethod
    def of_arguments(cls, given: Any) -> AppendCall:
        """The call whose op was given the arguments ``given`` (``native.schema.APPEND``)."""
        names = [field.name for field in fields(KVView)]
        view = KVView(**{name: getattr(given, name) for name in names})
        return cls(
            given.q, given.k_new, given.v_new, view, given.new_offsets, given.max_new,
            given.rotary_cos, given.rotary_sin, given.rotary_interleaved,
        )  # fmt: skip

    def _check_positions(self, given: bool) -> None:
        """A token must have one position where it is used as one; ``given``: they are known."""
        view = self.kv
        if view.num_k_heads != view.num_v_heads and view.lengths_per_head:
            raise NotImplementedError(
                "append: lengths per head need as many value heads as key heads, got "
                f"{view.num_k_heads} key heads and {view.num_v_heads} value heads"
            )
        if (self.rotary_cos is None) != (self.rotary_sin is None):
            raise ValueError("rotary_cos and rotary_sin must be given together, got one of them")
        if self.rotary_cos is not None and self.rotary_sin is not None:
            self.rotary_cos, self.rotary_sin = checks.resolve_rotary(
                self.rotary_cos, self.rotary_sin, self.k_new, self.rotary_interleaved
            )
            if view.lengths_per_head and self.q is not None and not given:
                raise NotImplementedError(
                    "append: with lengths per head a query has no one position; pass "
                    "rotary_positions, or set the cache's next_positions"
                )

    def _positions_by_length(self) -> Tensor:
        """``[B]``, positions of the first new tokens. The cache transforms keys after the rotary
        embedding, so that no kernel can apply the latter."""
        if self.kv.lengths_per_head:
            raise NotImplementedError(
                "rotary_positions must be given, or the cache's next_positions be set, with "
                "lengths per head and transformed keys (k_channels, hadamard), got None"
            )
        assert self.kv.kv_lengths is not None  # a cache has lengths
        return self.kv.kv_lengths[:, 0]

    def _rotate_at(self, positions: Tensor | None, first: Tensor | None) -> None:
        """Rotate q and k_new by positions that are not those that the lengths say. No kernel takes
        them, so this copies the new tokens."""
        if self.rotary_cos is None or self.rotary_sin is None:
            if positions is not None:
                raise ValueError("rotary_positions must be None without rotary_cos and rotary_sin")
            return
        if positions is None and first is None:
            return
        self.check()
        packed = self.new_offsets is not None
        if positions is None:
            assert first is not None
            positions = positions_from(first, self.k_new.shape[2], self.new_offsets)
        check_positions(positions, self.k_new, packed)
        table = (self.rotary_cos, self.rotary_sin, self.rotary_interleaved)
        at = positions.long()[None] if packed else positions.long()

        def rotated(x: Tensor) -> Tensor:
            return rotate(x.transpose(1, 2), at[..., None], *table).transpose(1, 2)

        self.k_new = rotated(self.k_new)
        if self.q is not None:
            self.q = rotated(self.q)
        self.rotary_cos = self.rotary_sin = None

    def check(self) -> None:
        """What is asked of the new tokens and queries, beside the view.

        Raises:
            ValueError, TypeError: the message names the argument, the rule and the value.
        """
        q, k_new, view = self.q, self.k_new, self.kv
        packed = self.new_offsets is not None
        for name, x in (("k_new", k_new), ("v_new", self.v_new)):
            checks.check_floating(name, x, view.device)
        stored = view.k.dtype if view.format is None else k_new.dtype
        tokens, leading = k_new.shape[2], 1 if packed else view.batch
        for name, x, heads, dim in (
            ("k_new", k_new, view.num_k_heads, view.head_dim),
            ("v_new", self.v_new, view.num_v_heads, view.value_head_dim),
        ):
            if x.dtype != stored:
                raise TypeError(f"{name}.dtype must be {stored}, got {x.dtype}")
            if x.shape != (leading, heads, tokens, dim):
                raise ValueError(
                    f"{name} must have shape {(leading, heads, tokens, dim)} as [B, H, S, D] "
                    f"({'packed, so B = 1' if packed else 'by the cache'}), got {tuple(x.shape)}"
                )
        if q is None:
            return
        checks.check_floating("q", q, view.device)
        if q.dtype != k_new.dtype or (q.shape[0], *q.shape[2:]) != (leading, tokens, view.head_dim):
            raise ValueError(
                f"q must have k_new's dtype and shape {(leading, '.', tokens, view.head_dim)} "
                f"as [B, Hq, S, D], got {q.dtype} {tuple(q.shape)}"
            )

    @property
    def rotated_q(self) -> Tensor | None:
        """The queries, if there is a table to rotate them by."""
        return None if self.rotary_cos is None else self.q

    @property
    def dtype(self) -> torch.dtype:
        return self.k_new.dtype

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of memory and packing, as ``Capabilities.caches`` has them."""
        kinds = self.kv.kinds
        return kinds if self.new_offsets is None else (*kinds, "varlen")

    def describe(self) -> str:
        """The call in words, for errors."""
        return f"append of k_new {tuple(self.k_new.shape)} to {self.kv.describe()}"
