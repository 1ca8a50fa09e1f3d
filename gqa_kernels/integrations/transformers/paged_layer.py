"""PagedLayer: one layer of a PagedCache: its pages, and attention over them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...attention import asym_gqa_attention
from ...backends.base import Backend
from ...backends.dispatch import select
from ...cache.hadamard import rotate_by_hadamard
from ...cache.paged import PagedKVCache
from ...cache.view import KVView
from ...call.append import AppendCall
from ...call.attention import AttentionCall
from ...decode import view_call
from .call import attention_call, with_bias
from .sequences import SequenceTable, Step
from .states import DeferredLayer, NewStates


class PagedLayer(DeferredLayer):
    """One layer: its pages, and attention over them.

    Attributes:
        table: positions and pages, shared with the layers of the same window.
        seen: positions given to this layer.
        pool: the pages, ``[P, Hkv, page_size, D]``; None before the first token.
    """

    is_croppable = True

    def __init__(
        self, table: SequenceTable, format: str | None, zeros: bool, hadamard: bool = False
    ):
        super().__init__()
        self.table, self.format, self.zeros, self.hadamard = table, format, zeros, hadamard
        self.is_sliding = table.window is not None
        self.seen = 0
        self.pool: PagedKVCache | None = None
        # The last checked call of each attention module that reads this layer.
        self._checked: WeakKeyDictionary[nn.Module, tuple[tuple, Any, AttentionCall, Backend]]
        self._checked = WeakKeyDictionary()
        self._writer: tuple[tuple, Backend] | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: NewStates,
        value: NewStates,
        attention_mask: Tensor | None,
        backend: str,
        **options: object,
    ) -> Tensor:
        """Store the new tokens; then attend over all tokens of the layer.

        In models whose layers share keys and values (Gemma 3n, Gemma 4), later layers pass the
        same ``key`` and ``value`` again. The tokens are stored once; the later calls only read.

        Args:
            module: the attention module that asks.
            query: ``[B, Hq, Sq, D]`` of the last ``Sq`` of the new tokens.
            key, value: what :meth:`update` returned.
            attention_mask: over all positions, ``[B or 1, H or 1, Sq, positions]``.
            backend, options: as :func:`.attention.asym_gqa` has them.

        Returns:
            ``[B, Sq, Hq, Dv]``.

        Raises:
            ValueError: the keys and values are those of an earlier forward pass.
        """
        if key.step is None:
            key.step = self._take(key.states, value.states, attention_mask, backend, options)
        elif key.step is not self.table.current:
            raise ValueError(
                "layers that share the keys of a PagedCache must run in the forward pass that "
                f"made them, got keys made after {key.step.before} positions"
            )
        step = key.step
        if not step.before:
            call = attention_call(
                module, query, key.states, value.states, attention_mask, **options
            )
            return asym_gqa_attention(**call, backend=backend)
        _, view = self._views(step)
        if self.hadamard:
            query = rotate_by_hadamard(query)
        inputs, runs = self._attention(
            module, query, key.states, value.states, attention_mask, step, view, backend, **options
        )
        out, _ = runs.attend(inputs)
        return out.transpose(1, 2)

    def _take(
        self,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        backend: str,
        options: dict[str, object],
    ) -> Step:
        """Store new tokens; the step they belong to."""
        self._check(key, value, options)
        step = self.table.step(self.seen, key.shape[0], key.shape[2], attention_mask, key.device)
        if self.pool is None:
            self.lazy_initialization(key, value)
        if len(self.pool.k) < self.table.allocator.num_pages:
            self._grow(self.table.allocator.num_pages)
        self.pool.copy_pages(step.copies)
        before, _ = self._views(step)
        if self.hadamard:
            key = rotate_by_hadamard(key)
        self._store(step, key, value, before, backend)
        self.seen = step.before + step.new
        return step

    def reset(self) -> None:
        """Forget the positions; the table forgets the pages."""
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty pool for keys and values like these."""
        (_, heads, _, dim), (_, value_heads, _, value_dim) = key_states.shape, value_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self._shapes = (heads, dim), (value_heads, value_dim)
        self.pool = self._empty(self.table.allocator.num_pages)
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of the pool: K, V and scales."""
        if self.pool is None:
            return 0
        held = (self.pool.k, self.pool.v, *self.pool.scales.values())
        return sum(x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor))

    def _check(self, key: Tensor, value: Tensor, options: dict[str, object]) -> None:
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError(
                "a PagedCache is for inference: call the model under torch.no_grad(), got keys "
                "that require a gradient"
            )
        if options.get("dropout"):
            raise ValueError(
                f"dropout must be 0 with a PagedCache, got {options['dropout']}: call model.eval()"
            )
        if self.pool is None:
            return
        for name, x, shape in (("key", key, self._shapes[0]), ("value", value, self._shapes[1])):
            if (x.shape[1], x.shape[3]) != shape or (x.dtype, x.device) != (
                self.dtype,
                self.device,
            ):
                raise ValueError(
                    f"{name}s must have {shape[0]} heads of {shape[1]} in {self.dtype} on "
                    f"{self.device}, as those before, got shape {tuple(x.shape)} in {x.dtype} on "
                    f"{x.device}"
                )

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        step: Step,
        view: KVView,
        backend: str,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[AttentionCall, Backend]:
        """The checked call of a step over the pages, and what runs it."""
        if position_bias is not None:
            attention_mask = with_bias(attention_mask, position_bias[..., : self.seen])
        masked = attention_mask is not None
        if masked:
            attention_mask = step.mask(attention_mask, view.capacity, query.shape[2])
        # Without a mask a step differs from the one before in its tensors alone: checked once.
        named = tuple(options.get(name) for name in ("scaling", "softcap", "sliding_window"))
        same = (backend, query.shape, query.dtype, options.get("is_causal"), named, masked)
        sinks = options.get("s_aux")
        if attention_mask is None and module in self._checked:
            known, known_sinks, inputs, runs = self._checked[module]
            if known == same and known_sinks is sinks:
                return inputs.with_q(query, view), runs
        call = attention_call(module, query, key, value, None, **options)
        if attention_mask is not None:
            call.update(attn_mask=attention_mask, causal=False, window=None)
        else:
            call["causal"] |= masked  # a mask that shows what is usual shows causality
            if step.window is not None:
                call["window"] = (step.window - 1, None)
        for name in ("k", "v", "dropout_p"):
            del call[name]
        inputs = view_call(call.pop("q"), view, call.pop("head_map"), **call)
        runs = select(inputs, backend)
        if attention_mask is None:
            self._checked[module] = same, sinks, inputs, runs
        return inputs, runs

    def _store(self, step: Step, key: Tensor, value: Tensor, view: KVView, backend: str) -> None:
        """Append the step's tokens to a view."""
        if step.kept is None:  # room, shapes and types are as they must be: no need to check again
            inputs = AppendCall(None, key, value, view, max_new=step.new)
        else:
            packed = (x.transpose(1, 2)[step.kept] for x in (key, value))  # [total, H, D]
            counts = step.lengths_after - step.lengths
            offsets = nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            inputs = AppendCall.create(*packed, view, cu_seqlens=offsets, max_seqlen=step.new)
        packs = step.kept is not None
        if self._writer is None or self._writer[0] != (backend, packs):
            self._writer = (backend, packs), select(inputs, backend)
        self._writer[1].append(inputs)

    def _views(self, step: Step) -> tuple[KVView, KVView]:
        """The pool as the step finds it, and as it leaves it."""
        pool = self.pool
        like = (pool.k.shape, pool.v.shape)
        if like not in step.views:  # checked for the first layer of a shape
            step.views[like] = tuple(
                KVView.create(pool.k, pool.v, lengths, page_table=step.page_table, **pool.scales)
                for lengths in (step.lengths, step.lengths_after)
            )
        before, after = step.views[like]
        if before.k is not pool.k:
            before = before.with_memory(pool.unchecked_view())
        return before, before.with_lengths(after.kv_lengths)

    def _empty(self, num_pages: int) -> PagedKVCache:
        (heads, dim), (value_heads, value_dim) = self._shapes
        return PagedKVCache.empty(
            num_pages, self.table.allocator.page_size, heads, dim, num_value_heads=value_heads,
            value_head_dim=value_dim, dtype=self.dtype, device=self.device, format=self.format,
            zeros=self.zeros, hadamard=self.hadamard,
        )  # fmt: skip

    def _grow(self, num_pages: int) -> None:
        old, self.pool = self.pool, self._empty(num_pages)
        for name in ("k", "v", *old.scales):
            x = getattr(old, name)
            if isinstance(x, Tensor):
                getattr(self.pool, name)[: len(x)].copy_(x)
