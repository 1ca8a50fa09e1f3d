"""PressedCache: the cache of a model that a press of kvpress compresses.

A layer holds a prompt as it came until a press has looked at it, and then in pages of each head.
Presses read ``layer.keys`` and ``layer.values``, and assign what they keep of them, or leave
``module.masked_key_indices``; both are applied at the assignment.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..transformers.cache import layer_windows
from ..transformers.headwise import HeadwiseLayer


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

    Examples:
        >>> cache = PressedCache(model.config)
        >>> with AdaKVPress(SnapKVPress(compression_ratio=0.75))(model):
        ...     model.model(input_ids=context, past_key_values=cache)
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


class PressedLayer(HeadwiseLayer):
    """One layer, whose keys and values a press can read and assign."""

    def __init__(self, page_size: int, format: str | None):
        self._assigned: Tensor | None = None
        super().__init__(page_size, format)

    def reset(self) -> None:
        super().reset()
        self._kept: Tensor | None = None  # bool [B, Hk, n]: of the first n positions; None: all
        self._lent: tuple[Tensor, Tensor] | None = None  # copies that presses look at
        self._module: ref[nn.Module] | None = None  # of the last call

    def _after_prompt(self, module: nn.Module) -> None:
        self._module = ref(module)
        module.masked_key_indices = None  # of an earlier prompt

    def _before_append(self, module: nn.Module) -> None:
        self._module, self._lent = ref(module), None
        self._drop_masked()

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
            lengths = [positions] * self._pages.num_heads
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
        rows, heads_of, positions = (index.to(like.device) for index in masked)
        inside = positions < self.seen  # others were cropped since
        kept[rows[inside], heads_of[inside], positions[inside]] = False
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
