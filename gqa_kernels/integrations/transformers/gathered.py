"""GatheredLayer: pages for models that compute with what they have cached, before attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends.reference.cache import gather
from ...cache.hadamard import rotate_by_hadamard
from .paged_layer import PagedLayer

BEFORE_ATTENTION = ("diffllama",)  # model types; DiffLlama splits its values


def computes_with_cached(config: Any) -> bool:
    """Whether a model's attention computes with cached keys or values itself: it expands latents
    (MLA, DeepSeek), or is one of ``BEFORE_ATTENTION``."""
    latents = getattr(config, "kv_lora_rank", None) is not None
    return latents or getattr(config, "model_type", None) in BEFORE_ATTENTION


class GatheredLayer(PagedLayer):
    """Stores new tokens at once, and gives the model a copy of all.

    Pages hold what the model caches: of MLA the latents, which are much smaller than the keys and
    values that the model makes of them. Padding is stored too, because the mask comes later.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """All keys and values, ``[B, Hk, positions, D]`` and ``[B, Hv, positions, Dv]``."""
        step = self._take(key_states, value_states, None, "auto", {})
        if not step.before:
            return key_states, value_states
        keys, values, _ = gather(self._views(step)[1])
        if self.hadamard:
            keys = rotate_by_hadamard(keys)
        return tuple(x[:, :, : self.seen].to(self.dtype) for x in (keys, values))
