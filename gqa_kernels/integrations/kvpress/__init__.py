"""kvpress: presses run unchanged, and what they drop takes no memory and no time.

kvpress (NVIDIA) compresses KV caches in transformers. Presses that drop other keys in each head
(AdaKV, CriticalAdaKV, DuoAttention, KVzip, ...) only mark them there, in
``module.masked_key_indices``: the keys stay in memory, and decode overwrites them with a key that
gets no attention. :class:`PressedCache` drops them. Its layers keep each head's keys in pages of
that head, with a length per head, and attention reads what is left.

Example::

    from gqa_kernels.integrations.kvpress import PressedCache, register

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=register())
    cache = PressedCache(model.config)
    with AdaKVPress(SnapKVPress(compression_ratio=0.75))(model):
        model.model(input_ids=context, past_key_values=cache)
    # then decode with `cache` and explicit position_ids, or pass cache= to kvpress's pipeline
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ..transformers import register as register_attention

if TYPE_CHECKING:
    from .cache import PressedCache

__all__ = ["PressedCache", "register"]


def register(name: str = "asym_gqa", backend: str = "auto") -> str:
    """Make ``attn_implementation=name`` available to models that presses compress; returns
    ``name``.

    kvpress wraps the attention functions it finds when it is imported. Ours must not be wrapped:
    :class:`PressedCache` itself drops what presses mark.

    Args:
        name, backend: as :func:`gqa_kernels.integrations.transformers.register` has them.

    Raises:
        ImportError: kvpress or transformers is missing or too old.
    """
    try:
        import kvpress  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"gqa_kernels.integrations.kvpress needs kvpress (pip install kvpress): {error}"
        ) from error
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register_attention(name, backend)
    with suppress(KeyError):
        del ALL_ATTENTION_FUNCTIONS[name]  # the wrapped one, which would go before ours
    return name


def __getattr__(name: str) -> object:
    if name == "PressedCache":
        from .cache import PressedCache

        return PressedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
