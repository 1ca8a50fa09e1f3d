"""PressedCache: the cache of a model that a press of kvpress compresses.

A layer holds a prompt as it came until a press has looked at it, and then in pages (:mod:`.pages`).
Presses read ``layer.keys`` and ``layer.values``, and assign what they keep of them, or leave
``module.masked_key_indices``; both are applied at the assignment.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ...attention import asym_gqa_attention
from ...decode import asym_gqa_decode
from ..transformers import attention_call
from ..transformers.cache import NewStates, layer_windows
from ..transformers.masks import SequenceMask
from .pages import HeadPages


class PressedCache(Cache):
    """Keys and values of all layers, each head with a length of its own.

    For models with ``attn_implementation="asym_gqa"`` (:func:`.register`), in inference, without
    padding. Positions count as in kvpress: ``get_seq_length`` is the number of keys after a press
    that drops the same number in each head, and that before it after one that masks keys.

    Args:
        config: of the model.
        page_size: keys of a page. Each head's last page is filled in part.
        format: as for :class:`gqa_kernels.integrations.transformers.PagedCache`.

    Raises:
        NotImplementedError: a layer has a sliding window, whose distances dropped keys change.
    """

    def __init__(self, config: Any, *, page_size: int = 16, format: str | None = None):
        windows = layer_windows(config.get_text_config(decoder=True))
        if any(window is not None for window in windows):
            raise NotImplementedError(
                "a PressedCache is for layers of full attention, got sliding windows in "
                "config.layer_types"
            )
        super().__init__(layers=[PressedLayer(page_size, format) for _ in windows])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held for keys, values and scales."""
        return sum(layer.nbytes for layer in self.layers)

    def reset(self) -> None:
        """Forget all keys."""
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("a PressedCache has no beam search")


class PressedLayer(CacheLayerMixin):
    """One layer: its keys and values as they came, or in pages, and attention over them.

    Attributes:
        seen: positions of the layer.
    """

    def __init__(self, page_size: int, format: str | None):
        self._page_size, self._format = page_size, format
        self._assigned: Tensor | None = None
        self.reset()
        super().__init__()

    def reset(self) -> None:
        self.seen = 0
        self._states: tuple[Tensor, Tensor] | None = None  # [B, Hk, seen, D], not in pages
        self._pages: HeadPages | None = None
        self._kept: Tensor | None = None  # bool [B, Hk, n]: of the first n positions; None: all
        self._lent: tuple[Tensor, Tensor] | None = None  # copies that presses look at
        self._module: ref[nn.Module] | None = None  # and the backend, of the last call
        self._backend = "auto"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Any, Any]:
        """New keys ``[B, Hk, S, D]`` and values, for the attention function to give back."""
        return NewStates(self, key_states), NewStates(self, value_states)

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
        """Store the new tokens; then attend over all keys that are left.

        Args:
            module: the attention module that asks.
            query: ``[B, Hq, S, D]``, as many as new keys.
            key, value: what :meth:`update` returned.
            attention_mask: must show every key up to the query's own position.
            backend, options: as :func:`gqa_kernels.integrations.transformers.asym_gqa` has them.

        Returns:
            ``[B, S, Hq, Dv]``.
        """
        _check_mask(attention_mask, self.seen, query.shape[2])
        self._module, self._backend, self._lent = ref(module), backend, None
        call = attention_call(module, query, key.states, value.states, None, **options)
        if call["dropout_p"]:
            raise ValueError(f"dropout must be 0 with a PressedCache, got {call['dropout_p']}")
        if not self.seen:
            module.masked_key_indices = None  # of an earlier prompt
            self.lazy_initialization(key.states, value.states)
            self._states, self.seen = (key.states, value.states), query.shape[2]
            return asym_gqa_attention(**call, backend=backend)
        self._drop_masked()
        self._to_pages()
        new = query.shape[2]
        assert self._pages is not None
        cache = self._pages.append(
            key.states.flatten(0, 2), value.states.flatten(0, 2),
            [new] * (self._pages.batch * self._pages.heads), backend,
        )  # fmt: skip
        self.seen += new
        return asym_gqa_decode(
            call["q"], cache, call["head_map"], value_head_map=call["value_head_map"],
            scale=call["scale"], softcap=call["softcap"], sinks=call["sinks"], layout="bshd",
            backend=backend,
        )  # fmt: skip

    @property
    def keys(self) -> Tensor | None:
        """``[B, Hk, seen, D]``, 0 at keys that were dropped: a copy of what is in pages."""
        return self._look()[0]

    @keys.setter
    def keys(self, x: Tensor | None) -> None:
        self._assigned = x  # the values follow

    @property
    def values(self) -> Tensor | None:
        """``[B, Hk, seen, Dv]``, likewise."""
        return self._look()[1]

    @values.setter
    def values(self, x: Tensor | None) -> None:
        keys, self._assigned = self._assigned, None
        if keys is None or x is None:  # nothing: the base class makes it so
            return
        looked_at, self._lent = self._look(), None
        if all(map(_is_start_of, (keys, x), looked_at)):
            self._crop(keys.shape[2])
        elif self._kept is not None:
            raise NotImplementedError(
                "after a press that drops other keys in each head, another must drop keys by "
                "masked_key_indices or keep the first ones, got other keys"
            )
        else:
            self._pages, self._states, self.seen = None, (keys, x), keys.shape[2]
        self._drop_masked()

    def get_seq_length(self) -> int:
        """Positions, those of masked keys included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    get_max_cache_shape = get_max_length  # transformers 4

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns that a mask needs, and the position of the first."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + new, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of K, V and scales."""
        if self._pages is not None:
            return self._pages.nbytes
        return sum(x.untyped_storage().nbytes() for x in self._states or ())

    def _look(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Keys and values by position."""
        if self._pages is None:
            return self._states or (None, None)
        if self._lent is None:
            stored = self._pages.dense()
            if self._kept is not None:
                kept = self._positions()
                used = torch.arange(stored[0].shape[2]) < self._pages.lengths[..., None]
                stored = tuple(_scattered(x, used.to(x.device), kept) for x in stored)
            self._lent = stored
        return self._lent

    def _positions(self) -> Tensor:
        """Which positions are stored, bool ``[B, Hk, seen]``."""
        assert self._kept is not None
        missing = self.seen - self._kept.shape[2]
        return nn.functional.pad(self._kept, (0, missing), value=True)

    def _crop(self, positions: int) -> None:
        """Keep the first positions only."""
        if positions == self.seen:
            return
        if self._states is not None:
            self._states = tuple(x[:, :, :positions].contiguous() for x in self._states)
        elif self._pages is not None:
            lengths = [positions] * (self._pages.batch * self._pages.heads)
            if self._kept is not None:
                self._kept = self._positions()[..., :positions].contiguous()
                lengths = self._kept.sum(-1).flatten().tolist()
            self._pages.truncate(lengths)
        self.seen = positions

    def _drop_masked(self) -> None:
        """Drop the keys that a press has marked in the attention module, if any."""
        module = None if self._module is None else self._module()
        masked = getattr(module, "masked_key_indices", None)
        if masked is None or not self.seen:
            return
        module.masked_key_indices = None
        like = self._states[0] if self._pages is None else self._pages.pool.k
        if self._pages is None:
            batch, heads = like.shape[:2]
        else:
            batch, heads = self._pages.batch, self._pages.heads
        kept = torch.ones(batch, heads, self.seen, dtype=torch.bool, device=like.device)
        kept[tuple(index.to(like.device) for index in masked)] = False
        if self._pages is None:
            self._to_pages(kept)
        else:
            stored = torch.ones_like(kept) if self._kept is None else self._positions()
            kept &= stored
            rank = stored.cumsum(-1) - 1
            row, head, position = kept.nonzero(as_tuple=True)
            among = torch.zeros_like(kept)
            among[row, head, rank[row, head, position]] = True
            longest = int(self._pages.lengths.max())
            self._pages.keep(among[..., :longest], self._backend)
        self._kept = None if bool(kept.all()) else kept

    def _to_pages(self, kept: Tensor | None = None) -> None:
        """Store in pages what is not in pages yet, or what a mask ``[B, Hk, seen]`` keeps of it."""
        if self._states is None:
            return
        k, v = self._states
        self._pages = HeadPages(k, v, self._page_size, self._format)
        if kept is None:
            rows, counts = (k.flatten(0, 2), v.flatten(0, 2)), [k.shape[2]] * k.shape[:2].numel()
        else:
            rows, counts = (k[kept], v[kept]), kept.sum(-1).flatten().tolist()
        self._pages.append(*rows, counts, self._backend, exact=True)
        self._states = None


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
        "attention_mask must hide nothing but what comes later with a PressedCache: no padding and "
        "no packed sequences"
    )


def _is_start_of(x: Tensor, whole: Tensor | None) -> bool:
    """Whether ``x`` is ``whole[:, :, :n]``, in the same memory."""
    if whole is None or x.dim() != 4 or x.data_ptr() != whole.data_ptr():
        return False
    fits = x.shape[:2] == whole.shape[:2] and x.shape[3] == whole.shape[3]
    return fits and x.shape[2] <= whole.shape[2] and x.stride() == whole.stride()


def _scattered(rows: Tensor, used: Tensor, kept: Tensor) -> Tensor:
    """Stored rows ``[B, Hk, n, D]`` by their positions, 0 elsewhere."""
    found = rows.new_zeros(*kept.shape, rows.shape[3])
    found[kept] = rows[used]
    return found
