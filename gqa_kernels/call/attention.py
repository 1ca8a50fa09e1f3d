"""AttentionCall: one attention call, over dense tensors, a cache or packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..cache.tensors import Layout, check_layout
from ..cache.view import KV_LENGTHS, KVView
from ..head_map import HeadMap
from ..native.arguments import check_tensors
from ..native.autograd import autocast, is_autocast_on, is_transformed, requires_grad
from ..native.dropout import draw_seed
from . import checks, kind_bits
from .checks import HeadMapLike, resolve_map
from .options import Options

Memory = Literal["dense", "cache", "packed"]

# What a number of KV heads is called, by the axis of the heads in the caller's dense tensors.
_HEADS_OF = {1: ("k.shape[1]", "v.shape[1]"), 2: ("k.shape[2]", "v.shape[2]")}
_CACHE_HEADS = ("key heads of the cache", "value heads of the cache")


@dataclass(eq=False)
class AttentionCall:
    """One call in the form that backends take; made by :meth:`dense`, :meth:`over` or
    :meth:`packed`.

    These check what is asked of the options, maps and biases. What is asked of q, k and v
    :meth:`check` does: backends whose op checks shapes itself need it only to explain a refusal.

    Attributes:
        q: ``[B, Hq, Sq, D]``; with ``q_offsets`` ``[1, Hq, total_q, D]``. This and all below are
            views, whatever layout the caller used.
        kv: where the keys and values lie.
        options: scale, window, softcap and dropout.
        memory: what the caller gave: dense tensors, a cache, or packed sequences.
        bshd: memory order of out: ``[B, Sq, Hq, Dv]``, or ``[total_q, Hq, Dv]`` if packed.
        head_map: a HeadMap if the host can read it, else an int32 tensor ``[Hq]``.
        value_head_map: the same for V; None if V follows ``head_map``.
        alibi_slopes: fp32 ``[B, Hq]`` or None.
        sinks: fp32 ``[Hq]`` or None.
        attn_mask: boolean or floating ``[B, Hq, Sq, capacity]`` (strides may be 0) or None; of
            packed sequences ``[B, Hq, max_q_len, max_kv_len]``, and over a cache ``[B, Hq,
            max_q_len, capacity]`` if queries are packed.
        q_offsets: int32 ``[B + 1]`` or None: the queries of sequence ``b`` are the tokens
            ``q_offsets[b]`` up to ``q_offsets[b + 1]``.
        max_q_len, max_kv_len: with ``q_offsets``, most queries and keys of a sequence. They size
            grids and masks and choose splits, and nothing else.
        key_ranges: int32 ``[B, Hq, Sq, 2]`` (strides may be 0) or None: the first key that a query
            sees and the one behind the last; ``[B, Hq, max_q_len, 2]`` if queries are packed.
        dropout_seed: int64 ``[2]``, seed and offset (:mod:`gqa_kernels.native.dropout`), or None.
        lse_wanted: whether the LSE will be read.
        requires_grad: whether autograd records the call.
        head_dims: the last sizes of q and of the stored values.
        kind: which tensors and which memory the call has, as :func:`.kind_bits.find_kind` says.
    """

    q: Tensor
    kv: KVView
    options: Options
    memory: Memory
    bshd: bool
    head_map: HeadMap | Tensor
    value_head_map: HeadMap | Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    attn_mask: Tensor | None = None
    q_offsets: Tensor | None = None
    max_q_len: int = 0
    max_kv_len: int = 0
    dropout_seed: Tensor | None = None
    key_ranges: Tensor | None = None
    lse_wanted: bool = True
    requires_grad: bool = False
    head_dims: tuple[int, int] = field(init=False)  # this and the kind: set by what makes a call
    kind: int = field(init=False, default=-1)

    @classmethod
    def dense(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        head_map: HeadMapLike,
        value_head_map: HeadMapLike | None = None,
        causal: bool = False,
        scale: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        kv_lengths: Tensor | Sequence[int] | None = None,
        dropout_p: float = 0.0,
        layout: Layout = "bhsd",
        batch_invariant: bool = False,
        key_ranges: Tensor | None = None,
    ) -> AttentionCall:
        """The call of :func:`gqa_kernels.asym_gqa_attention`, whose arguments these are."""
        options = Options.of(causal, scale, window, softcap, dropout_p, batch_invariant)
        if is_autocast_on():
            q, k, v = autocast(q, k, v)
        bshd = layout != "bhsd"
        if bshd:
            check_layout(layout)
        are_tensors = type(q) is type(k) is type(v) is Tensor
        if not are_tensors or (bshd and not q.dim() == k.dim() == v.dim() == 4):
            checks.check_dense(*checks.dense_heads_first(q, k, v, bshd), 1 + bshd)
        if bshd:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        kind = 0  # no bit says that the memory is dense
        if kv_lengths is not None:
            kv_lengths = checks.resolve_lengths(kv_lengths, k)
            kind |= KV_LENGTHS
        call = cls._of(q, KVView.dense(k, v, kv_lengths), options, "dense", bshd, kind)
        return call._complete(
            head_map, value_head_map, alibi_slopes, sinks, attn_mask, key_ranges
        )  # fmt: skip

    @classmethod
    def over(
        cls,
        q: Tensor,
        view: KVView,
        head_map: HeadMapLike,
        options: Options,
        *,
        value_head_map: HeadMapLike | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_ranges: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        layout: Layout = "bhsd",
        memory: Memory = "cache",
    ) -> AttentionCall:
        """The call of :func:`gqa_kernels.asym_gqa_decode`, whose arguments these are, over the view
        of its cache. ``max_seqlen_k``: default the view's capacity."""
        packed = cu_seqlens_q is not None
        if packed:
            check_tensors(cu_seqlens_q=cu_seqlens_q)
        elif max_seqlen_q is not None:
            checks.check_longest("max_seqlen_q", max_seqlen_q)
        if packed or layout != "bhsd" or type(q) is not Tensor or q.dim() != 4:
            q = checks.heads_first("q", q, layout, packed)
        kind = kind_bits.MEMORY[memory] | view.kind
        call = cls._of(q, view, options, memory, packed or layout == "bshd", kind)
        if cu_seqlens_q is not None:
            call.kind |= kind_bits.PACKED_QUERIES
            call.q_offsets, call.max_q_len = checks.resolve_offsets(
                "cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q, view.batch
            )
            attn_mask, key_ranges = (
                checks.first_rows(x, -2, max_seqlen_q, call.max_q_len)
                for x in (attn_mask, key_ranges)
            )
            capacity = view.capacity
            call.max_kv_len = capacity if max_seqlen_k is None else min(max_seqlen_k, capacity)
        return call._complete(
            head_map, value_head_map, alibi_slopes, sinks, attn_mask, key_ranges
        )  # fmt: skip

    @classmethod
    def packed(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        head_map: HeadMapLike,
        options: Options,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **others: Any,
    ) -> AttentionCall:
        """The call of :func:`gqa_kernels.asym_gqa_varlen_attention`, whose arguments these are: a
        storage that every sequence sees, and where each sequence begins in it."""
        k, v = (checks.heads_first(name, x, "bhsd", True) for name, x in (("k", k), ("v", v)))
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"v.shape[0] must equal k.shape[0] ({k.shape[2]}), got {v.shape[2]}")
        checks.check_head_dims(k, v, 2)
        check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        batch = max(cu_seqlens_k.numel() - 1, 0)
        offsets, most_keys = checks.resolve_offsets(
            "cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k, batch
        )
        mask = others.pop("attn_mask", None)
        others["attn_mask"] = checks.first_rows(mask, -1, max_seqlen_k, most_keys)
        return cls.over(
            q, KVView.packed(k, v, offsets), head_map, options, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=most_keys, memory="packed", **others,
        )  # fmt: skip

    @staticmethod
    def _of(
        q: Tensor, kv: KVView, options: Options, memory: Memory, bshd: bool, kind: int
    ) -> AttentionCall:
        """A call that :meth:`_complete` gives its maps and what else it has. ``__init__`` takes
        several times as long, so this sets only the fields that differ from their default."""
        call: AttentionCall = object.__new__(AttentionCall)
        call.q, call.kv, call.options, call.memory, call.bshd = q, kv, options, memory, bshd
        call.kind = kind
        return call

    def _complete(
        self, head_map: HeadMapLike, value_head_map: HeadMapLike | None,
        alibi_slopes: Tensor | None, sinks: Tensor | None, attn_mask: Tensor | None,
        key_ranges: Tensor | None,
    ) -> AttentionCall:  # fmt: skip
        """Check and enter the maps, the biases and the key ranges."""
        q, k, v = self.q, self.kv.k, self.kv.v
        try:
            _, num_heads, _, head_dim = q.shape
            _, k_heads, _, _ = k.shape
            _, v_heads, _, v_dim = v.shape
            self.head_dims = head_dim, v_dim
            # The op finds a map whose length is not that of q's heads.
            if type(head_map) is not HeadMap or head_map.num_kv_heads != k_heads:
                rule = self._heads_of[0]
                head_map = resolve_map(
                    "head_map", head_map, num_heads, k_heads, rule, q.device
                )  # fmt: skip
                if type(head_map) is not HeadMap:
                    self.kind |= kind_bits.DEVICE_MAP
            self.head_map = head_map
            if value_head_map is not None:
                if type(value_head_map) is not HeadMap or value_head_map.num_kv_heads != v_heads:
                    rule = self._heads_of[1]
                    value_head_map = resolve_map(
                        "value_head_map", value_head_map, num_heads, v_heads, rule, q.device
                    )
                self.value_head_map = value_head_map
                self.kind |= kind_bits.VALUE_MAP
                if type(value_head_map) is not HeadMap:
                    self.kind |= kind_bits.VALUE_DEVICE_MAP
            elif v_heads != k_heads:
                self._refuse_heads()
            if alibi_slopes is not None:
                self.alibi_slopes = checks.resolve_slopes(alibi_slopes, q, self.kv.batch)
                self.kind |= kind_bits.SLOPES
            if sinks is not None:
                self.sinks = checks.resolve_sinks(sinks, q)
                self.kind |= kind_bits.SINKS
            if attn_mask is not None:
                self.attn_mask = checks.resolve_mask(attn_mask, q, self._mask_shape(), self.memory)
                self.kind |= kind_bits.mask_kind(self.attn_mask)
            if key_ranges is not None:
                target = self._mask_shape()[:3]
                self.key_ranges = checks.resolve_ranges(key_ranges, q, target)
                self.kind |= kind_bits.RANGES
        except (TypeError, ValueError):
            self._check_tensors()  # whatever is wrong with them comes first
            raise
        if torch.is_grad_enabled():
            self.requires_grad = requires_grad(
                q, k, v, self.alibi_slopes, self.sinks, self.attn_mask
            )
        return self

    def _mask_shape(self) -> tuple[int, int, int, int]:
        """``[B, Hq, Sq, Sk]`` of a mask; queries and keys are counted in their sequence."""
        keys = self.max_kv_len if self.memory == "packed" else self.kv.capacity
        return self.kv.batch, self.num_heads, self.q_len, keys

    @property
    def _heads_of(self) -> tuple[str, str]:
        """What the numbers of key heads and of value heads are called."""
        return _HEADS_OF[1 + self.bshd] if self.memory == "dense" else _CACHE_HEADS

    def _refuse_heads(self) -> None:
        heads_of = self._heads_of
        k_heads, v_heads = self.kv.num_k_heads, self.kv.num_v_heads
        if self.memory == "dense":
            raise ValueError(
                f"{heads_of[1]} must equal {heads_of[0]} ({k_heads}) where no value_head_map is "
                f"given, got {v_heads}"
            )
        raise ValueError(
            f"the cache must have as many value heads as key heads ({k_heads}) where no "
            f"value_head_map is given, got {v_heads}"
        )

    def check(self) -> None:
        """What is asked of q and of the memory, and of both together.

        Raises:
            ValueError, TypeError: the message names the argument, the rule and the value.
            NotImplementedError: a value head map over pages per head.
        """
        self._check_tensors()
        q, view = self.q, self.kv
        key_heads, value_heads = self._heads_of
        for value, name, heads, rule in (
            (self.head_map, "head_map", view.num_k_heads, key_heads),
            (self.value_head_map, "value_head_map", view.num_v_heads, value_heads),
        ):
            if value is not None:
                resolve_map(name, value, q.shape[1], heads, rule, q.device)

    def _check_tensors(self) -> None:
        if self.memory == "dense":
            checks.check_dense(self.q, self.kv.k, self.kv.v, 1 + self.bshd)
        else:
            self._check_view()

    def _check_view(self) -> None:
        q, view = self.q, self.kv
        checks.check_floating("q", q, view.device)
        if self.memory == "packed":
            for name, x in (("k", view.k), ("v", view.v)):
                checks.check_floating(name, x, view.device)
            if view.v.dtype != view.k.dtype:
                raise TypeError(f"v.dtype must equal k.dtype ({view.k.dtype}), got {view.v.dtype}")
        if self.q_offsets is None and q.shape[0] != view.batch:
            raise ValueError(
                f"q.shape[0] must equal the cache's batch ({view.batch}), got {q.shape[0]}"
            )
        if view.format is None and q.dtype != view.k.dtype:
            raise TypeError(f"q.dtype must equal the cache's ({view.k.dtype}), got {q.dtype}")
        if q.shape[3] != view.head_dim:
            raise ValueError(
                f"the head dim of q must equal that of the cache's keys ({view.head_dim}), "
                f"got {q.shape[3]}"
            )
        if self.value_head_map is not None and view.pages_per_head:
            raise NotImplementedError(
                "value_head_map must be None where the page table is per head: a page of a key "
                "head holds the values of its own head"
            )

    def draw_dropout_seed(self) -> AttentionCall:
        """This call, with a seed from torch's default generator if it drops anything."""
        if self.options.dropout_p:
            self.dropout_seed = draw_seed(self.q.device)
            self.kind |= kind_bits.DROPOUT_SEED
        return self

    def with_q(self, q: Tensor, view: KVView) -> AttentionCall:
        """The same call of other queries and memory, of the same kind."""
        grad = torch.is_grad_enabled() and requires_grad(q, view.k, view.v, *self.biases)
        call = AttentionCall(
            q, view, self.options, self.memory, self.bshd, self.head_map, self.value_head_map,
            *self.biases, self.q_offsets, self.max_q_len, self.max_kv_len,
            key_ranges=self.key_ranges, requires_grad=grad,
        )  # fmt: skip
        call.head_dims, call.kind = self.head_dims, self.kind
        return call

    def replace(self, **changes: Any) -> AttentionCall:
        """The same call with other values, unchecked. Those of the view and of the options go by
        their own names."""
        for part, replaced in (
            ("kv", partial(replace, self.kv)),
            ("options", self.options.replace),
        ):
            names = {field.name for field in fields(getattr(self, part))} & changes.keys()
            if names:
                changes[part] = replaced(**{name: changes.pop(name) for name in names})
        call = replace(self, **changes)
        call.head_dims, call.kind = (call.q.shape[3], call.kv.v.shape[3]), kind_bits.find_kind(call)
        return call

    @property
    def k(self) -> Tensor:
        return self.kv.k

    @property
    def v(self) -> Tensor:
        return self.kv.v

    @property
    def batch(self) -> int:
        return self.kv.batch

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_k_heads(self) -> int:
        return self.kv.num_k_heads

    @property
    def num_v_heads(self) -> int:
        return self.kv.num_v_heads

    @property
    def q_len(self) -> int:
        """``Sq``: query tokens of a sequence, at most."""
        return self.q.shape[2] if self.q_offsets is None else self.max_q_len

    @property
    def kv_len(self) -> int:
        """``Sk``: key slots of a sequence."""
        return self.kv.capacity

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def value_head_dim(self) -> int:
        return self.kv.value_head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        scale = self.options.scale
        return self.head_dim**-0.5 if scale is None else scale

    @property
    def head_map_tensor(self) -> Tensor:
        """The key head map as an int32 tensor ``[Hq]`` on the call's device."""
        return _map_tensor(self.head_map, self.q)

    @property
    def value_head_map_tensor(self) -> Tensor | None:
        """The value head map likewise, or None if V follows the key head map."""
        value_map = self.value_head_map
        return None if value_map is None else _map_tensor(value_map, self.q)

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is added to scores, and the sinks."""
        return self.alibi_slopes, self.sinks, self.attn_mask

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of memory and packing, as ``Capabilities.caches`` has them."""
        kinds = () if self.memory == "dense" else self.kv.kinds
        return kinds if self.q_offsets is None else (*kinds, "varlen")

    @property
    def used(self) -> list[str]:
        """Names of the options in use, as ``Capabilities.options`` has them."""
        used, mask = list(self.options.used), self.attn_mask
        in_use = {
            "value_head_map": self.value_head_map is not None,
            "alibi": self.alibi_slopes is not None,
            "sinks": self.sinks is not None,
            "bool_mask": mask is not None and mask.dtype == torch.bool,
            "additive_mask": mask is not None and mask.dtype != torch.bool,
            "varlen_mask": mask is not None and self.q_offsets is not None,
            "varlen_dropout": bool(self.options.dropout_p) and self.q_offsets is not None,
            "key_ranges": self.key_ranges is not None,
            "kv_lengths": self.memory == "dense" and self.kv.kv_lengths is not None,
            "device_map": isinstance(self.head_map, Tensor)
            or isinstance(self.value_head_map, Tensor),
            "mask_gradient": requires_grad(mask),
            "torch_func": is_transformed(self.q, self.kv.k, self.kv.v, *self.biases),
        }
        return used + [name for name, is_used in in_use.items() if is_used]

    def describe(self) -> str:
        """The call in words, for errors."""
        used = self.used
        with_options = f" with {', '.join(used)}" if used else ""
        q, k, v = (tuple(x.shape) for x in (self.q, self.kv.k, self.kv.v))
        if self.memory == "dense":
            where = f"q {q}, k {k}, v {v} as [B, H, S, D] in {self.dtype} on {self.device}"
        else:
            where = f"q {q} in {self.dtype} over {self.kv.describe()}"
        return where + with_options


def _map_tensor(head_map: HeadMap | Tensor, q: Tensor) -> Tensor:
    if type(head_map) is not HeadMap:
        return head_map
    if type(q) is Tensor and q.is_cpu:
        return head_map.cpu_tensor
    return head_map.tensor(q.device)
