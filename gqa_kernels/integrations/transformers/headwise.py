"""HeadwiseLayer: a cache layer whose heads have lengths of their own; and sinks with windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import asym_gqa_attention
from ...decode import asym_gqa_decode
from ...native.arguments import as_int
from .call import attention_call
from .head_pages import HeadPages
from .masks import SequenceMask
from .states import DeferredLayer, NewStates

Budget = tuple[int, int] | None  # (sinks, recent keys) that a head keeps; None: all


class HeadwiseLayer(DeferredLayer):
    """Keys and values as they came, or in pages of one head each, and attention over them.

    In inference, without padding: a mask must show what causality shows.

    Args:
        page_size: keys of a page.
        format, zeros, hadamard: as for :class:`gqa_kernels.integrations.transformers.PagedCache`.

    Attributes:
        seen: positions of the layer, those of dropped keys included.
    """

    is_sliding = False
    is_croppable = False

    def __init__(
        self, page_size: int, format: str | None, zeros: bool = False, hadamard: bool = False
    ):
        self._page_size, self._stored = page_size, (format, zeros, hadamard)
        self.reset()
        super().__init__()

    def reset(self) -> None:
        self.seen = 0
        self._states: tuple[Tensor, Tensor] | None = None  # [B, Hk, seen, D], not in pages
        self._pages: HeadPages | None = None
        self._backend = "auto"  # of the last call

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: NewStates,
        value: NewStates,
        attention_mask: Tensor | SequenceMask | None,
        backend: str,
        **options: Any,
    ) -> Tensor:
        """Store the new tokens; then attend over all keys that are left. A prompt attends to its
        own keys, all of them.

        Args:
            module: the attention module that asks.
            query: ``[B, Hq, S, D]``, as many as new keys.
            key, value: what :meth:`update` returned.
            attention_mask: must show every key up to the query's own position.
            backend, options: as :func:`.attention.asym_gqa` has them.

        Returns:
            ``[B, S, Hq, Dv]``.
        """
        new = query.shape[2]
        _check_mask(attention_mask, self.seen, new)
        self._backend = backend
        call = attention_call(module, query, key.states, value.states, None, **options)
        if call["dropout_p"]:
            raise ValueError(f"dropout must be 0 with this cache, got {call['dropout_p']}")
        if call["window"] is not None:
            raise NotImplementedError(
                f"window must be None with keys that each head drops, got {call['window']}"
            )
        if not self.seen:
            self.lazy_initialization(key.states, value.states)
            self._states, self.seen = (key.states, value.states), new
            self._after_prompt(module)
            return asym_gqa_attention(**call, backend=backend)
        self._before_append(module)
        self._to_pages()
        assert self._pages is not None
        cache = self._pages.append(
            key.states.flatten(0, 2), value.states.flatten(0, 2),
            [new] * self._pages.num_heads, backend,
        )  # fmt: skip
        self.seen += new
        return asym_gqa_decode(
            call["q"], cache, call["head_map"], value_head_map=call["value_head_map"],
            scale=call["scale"], softcap=call["softcap"], sinks=call["sinks"], layout="bshd",
            backend=backend,
        )  # fmt: skip

    def _after_prompt(self, module: nn.Module) -> None:
        """The first keys are there, in ``_states``."""

    def _before_append(self, module: nn.Module) -> None:
        """New keys come."""

    def _to_pages(self, kept: Tensor | None = None) -> None:
        """Store in pages what is not in pages yet, or what a mask ``[B, Hk, seen]`` keeps of it."""
        if self._states is None:
            return
        k, v = self._states
        self._pages = HeadPages(k, v, self._page_size, *self._stored)
        if kept is None:
            rows, counts = (k.flatten(0, 2), v.flatten(0, 2)), [k.shape[2]] * self._pages.num_heads
        else:
            rows, counts = (k[kept], v[kept]), kept.sum(-1).flatten().tolist()
        self._pages.append(*rows, counts, self._backend, exact=True)
        self._states = None

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of K, V and scales."""
        if self._pages is not None:
            return self._pages.nbytes
        return sum(x.untyped_storage().nbytes() for x in self._states or ())


class BudgetedLayer(HeadwiseLayer):
    """A layer in which some heads keep attention sinks and a window of recent keys
    (StreamingLLM, arXiv 2309.17453; DuoAttention, arXiv 2410.10819).

    Whole pages are dropped, so that nothing moves: a head keeps its sinks, rounded up to pages, and
    at least its recent keys, up to a page more.

    Args:
        budgets: of each KV head.
    """

    def __init__(
        self, page_size: int, format: str | None, zeros: bool, hadamard: bool,
        budgets: Sequence[Budget],
    ):  # fmt: skip
        self._budgets = budgets
        super().__init__(page_size, format, zeros, hadamard)

    def reset(self) -> None:
        super().reset()
        self._dropped = [0] * len(self._budgets)  # keys of each head

    def _after_prompt(self, module: nn.Module) -> None:
        k, _ = self._states
        if k.shape[1] != len(self._budgets):
            raise ValueError(
                f"budgets must have one entry per KV head of a layer ({k.shape[1]}), got "
                f"{len(self._budgets)}"
            )
        position = torch.arange(self.seen, device=k.device)
        kept = torch.ones(k.shape[1], self.seen, dtype=torch.bool, device=k.device)
        for head, row in enumerate(kept):
            begin, count = self._droppable(head)
            row &= (position < begin) | (position >= begin + count)
            self._dropped[head] += count
        self._to_pages(kept.expand(k.shape[0], -1, -1))

    def _before_append(self, module: nn.Module) -> None:
        for head in range(len(self._budgets)):
            begin, count = self._droppable(head)
            if count:
                for row in range(self._pages.batch):
                    self._pages.discard(row * len(self._budgets) + head, count, begin)
                self._dropped[head] += count

    def _droppable(self, head: int) -> tuple[int, int]:
        """The first key that a head can drop before the next query, and how many: whole pages."""
        budget, page = self._budgets[head], self._page_size
        if budget is None:
            return 0, 0
        sinks, recent = budget
        begin = -(-sinks // page) * page
        # The next query sees itself and the recent - 1 keys before it.
        old = self.seen - (recent - 1) - self._dropped[head] - begin
        return begin, max(old, 0) // page * page


def as_budgets(budgets: object, num_layers: int) -> list[list[Budget]]:
    """Check the budgets of a cache: for each layer None, or for each KV head None or a pair."""
    if not isinstance(budgets, (list, tuple)) or len(budgets) != num_layers:
        raise ValueError(
            f"budgets must be a list with one entry per layer ({num_layers}), got "
            f"{len(budgets) if isinstance(budgets, (list, tuple)) else type(budgets).__name__}"
        )
    return [[] if layer is None else [_as_budget(head) for head in layer] for layer in budgets]


def _as_budget(head: object) -> Budget:
    if head is None:
        return None
    if not isinstance(head, (list, tuple)) or len(head) != 2:
        raise ValueError(f"a budget must be None or a pair (sinks, recent), got {head!r}")
    sinks, recent = as_int("sinks", head[0]), as_int("recent", head[1])
    if sinks < 0 or recent < 1:
        raise ValueError(
            f"a budget must have sinks of 0 or more and recent of 1 or more, got {head!r}"
        )
    return sinks, recent


def _check_mask(mask: Tensor | SequenceMask | None, before: int, new: int) -> None:
    """A mask must show just what causality shows."""
    if mask is None or (isinstance(mask, SequenceMask) and mask.offsets is None):
        return
    if isinstance(mask, Tensor):
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        column = torch.arange(before + new, device=mask.device)
        usual = column <= column[before:, None]
        if bool((visible[..., : before + new] == usual).all()):
            return
    raise NotImplementedError(
        "attention_mask must hide nothing but what comes later where heads drop keys: no padding "
        "and no packed sequences"
    )
