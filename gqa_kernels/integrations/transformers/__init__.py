"""Hugging Face transformers: ``attn_implementation="asym_gqa"`` for models with head maps.

The maps come from the model's config (:mod:`gqa_kernels.models.maps`). A model without them runs as
ordinary GQA. :class:`PagedCache` stores the keys and values of ``generate`` in pages of this
package's caches, optionally quantised. :func:`continuous_batching` runs ``generate_batch`` on it.

:func:`register` and :class:`PagedCache` import transformers when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attention import asym_gqa, register
from .call import attention_call
from .continuous import continuous_batching
from .versions import require_transformers

if TYPE_CHECKING:
    from .cache import PagedCache

__all__ = ["PagedCache", "asym_gqa", "attention_call", "continuous_batching", "register"]


def __getattr__(name: str) -> object:
    if name == "PagedCache":
        require_transformers()
        from .cache import PagedCache

        return PagedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
