"""The attention function of ``attn_implementation="asym_gqa"``, and its registration."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn

from ...attention import asym_gqa_attention
from .call import attention_call
from .guards import reads_maps, watch_new_models
from .masks import SequenceMask, sequence_mask
from .packed import batched_attention, packed_attention, refuse_block_table
from .versions import require_transformers


def register(name: str = "asym_gqa", backend: str = "auto") -> str:
    """Make ``attn_implementation=name`` available in transformers; returns ``name``.

    It also installs a hook of ``torch.nn``, which inspects modules as models are built. A config
    with uneven maps gets its guard back, which transformers removes when it loads the config. The
    model's attention layers refuse attention functions that ignore the maps.

    Args:
        name: the name that models use. Register several names to compare backends.
        backend: backend of :func:`gqa_kernels.asym_gqa_attention`.

    Raises:
        ImportError: transformers is missing or too old.

    Examples:
        >>> model = AutoModelForCausalLM.from_pretrained("child", attn_implementation=register())
    """
    require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    @reads_maps
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options
    ) -> tuple[Tensor, None]:
        return asym_gqa(module, query, key, value, attention_mask, backend=backend, **options), None

    AttentionInterface.register(name, attention)
    # Without a mask function of the same name, models ignore the padding mask.
    AttentionMaskInterface.register(name, sequence_mask)
    watch_new_models()
    return name


def asym_gqa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | SequenceMask | None,
    backend: str = "auto",
    **options: object,
) -> Tensor:
    """Attention of one layer, in the form that ``AttentionInterface`` calls: ``[B, Sq, Hq,
    Dv]``."""
    if not isinstance(key, Tensor):  # new tokens of a PagedCache, see cache.py
        return key.layer.attend(module, query, key, value, attention_mask, backend, **options)
    if not torch.compiler.is_compiling() and _weights_are_wanted(options):
        _warn_no_weights()
    refuse_block_table(options)
    if options.get("cache") is not None:  # continuous batching, before transformers 5.24
        return batched_attention(module, query, key, value, backend, **options)
    may_be_packed = query.shape[2] > 1 and not isinstance(attention_mask, Tensor)
    if (may_be_packed or "cu_seq_lens_q" in options) and not torch.compiler.is_compiling():
        out = packed_attention(module, query, key, value, attention_mask, backend, **options)
        if out is not None:
            return out
    call = attention_call(module, query, key, value, attention_mask, **options)
    return asym_gqa_attention(**call, backend=backend)


def _weights_are_wanted(options: dict[str, object]) -> bool:
    """Whether the model's caller requested attention weights."""
    if options.get("output_attentions"):
        return True
    collector = _collector()  # some models pass the request on only in this way
    wanted = None if collector is None else collector.get()
    return bool(wanted) and not {"attentions", "cross_attentions"}.isdisjoint(wanted)


@cache
def _collector() -> ContextVar | None:
    """Where transformers 5 stores which outputs of a model's layers it collects."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    return _active_collector


@cache
def _warn_no_weights() -> None:
    warnings.warn(
        "output_attentions gets no attention weights from asym_gqa, which does not store them: "
        "use attn_implementation='eager' on a model with equal groups to have them",
        stacklevel=3,
    )
