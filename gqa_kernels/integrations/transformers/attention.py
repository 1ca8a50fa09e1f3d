"""The attention function of ``attn_implementation="asym_gqa"``, and its registration."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from ...attention import asym_gqa_attention
from ...models.maps import IMPLEMENTATION_FIELD, KEY_FIELD, guard, layer_index, layer_maps
from .masks import SequenceMask, sequence_mask
from .packed import batched_attention, packed_attention

OLDEST = "4.57"  # first release tested


def register(name: str = "asym_gqa", backend: str = "auto") -> str:
    """Make ``attn_implementation=name`` available in transformers; returns ``name``.

    A hook of ``torch.nn`` also looks at modules as models are built: a config with uneven maps gets
    back the field that asks for this implementation, which transformers takes out.

    Args:
        name: what models ask for. Register several names to compare backends.
        backend: backend of :func:`gqa_kernels.asym_gqa_attention`.

    Raises:
        ImportError: transformers is missing or too old.
    """
    require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options
    ) -> tuple[Tensor, None]:
        return asym_gqa(module, query, key, value, attention_mask, backend=backend, **options), None

    AttentionInterface.register(name, attention)
    # Without a mask function of the same name, models drop the padding mask.
    AttentionMaskInterface.register(name, sequence_mask)
    _keep_guards()
    return name


def require_transformers(oldest: str = OLDEST) -> None:
    """Raise ImportError, with the version needed, unless transformers is there and new enough."""
    problem = None
    try:
        found = version("transformers")
        import transformers.masking_utils  # noqa: F401
    except PackageNotFoundError:
        problem = "it is not installed"
    except ImportError as error:
        problem = f"{found} can't be imported: {error}"
    else:
        if tuple(map(int, found.split(".")[:2])) < tuple(map(int, oldest.split("."))):
            problem = f"found {found}"
    if problem:
        raise ImportError(
            f"gqa_kernels.integrations.transformers needs transformers >= {oldest} "
            f"(pip install 'transformers>={oldest}'): {problem}"
        )


def asym_gqa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | SequenceMask | None,
    backend: str = "auto",
    **options: object,
) -> Tensor:
    """The attention of one layer, as ``AttentionInterface`` calls it: ``[B, Sq, Hq, Dv]``."""
    if not isinstance(key, Tensor):  # new tokens of a PagedCache, see cache.py
        return key.layer.attend(
            module, query, key.states, value.states, attention_mask, backend, **options
        )
    if options.get("cache") is not None:  # transformers' continuous batching
        return batched_attention(module, query, key, value, backend, **options)
    may_be_packed = query.shape[2] > 1 and not isinstance(attention_mask, Tensor)
    if (may_be_packed or "cu_seq_lens_q" in options) and not torch.compiler.is_compiling():
        out = packed_attention(module, query, key, value, attention_mask, backend, **options)
        if out is not None:
            return out
    call = attention_call(module, query, key, value, attention_mask, **options)
    return asym_gqa_attention(**call, backend=backend)


def attention_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | SequenceMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: object,
) -> dict[str, object]:
    """The arguments of :func:`gqa_kernels.asym_gqa_attention` for a call of the interface.

    Args:
        module: the attention layer; its ``config`` and ``layer_idx`` lead to the maps.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]``, cached tokens included.
        attention_mask: ``[B, 1 or Hq, Sq, >= Sk]``, boolean or additive, with causality, window and
            padding in it; or what says so in short; None where plain causality is enough.
        sliding_window: keys a query sees, its own included.
        dropout: part of the probabilities to drop; 0 outside training.
        s_aux: attention sinks ``[Hq]``.
        position_bias: ``[1 or B, Hq, Sq, Sk]``, added to the scores (T5).
        cu_seq_lens_q: ``[n + 1]``, where packed sequences begin in the one row. They don't see each
            other, also where the model makes its mask without regard to position ids (GPT-OSS).
    """
    q_len = query.shape[2]
    causal = False
    window = None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(attention_mask, SequenceMask):
        is_causal, sliding_window = True, attention_mask.window
        attention_mask = None if attention_mask.offsets is None else attention_mask.dense
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        attention_mask = _packed(cu_seq_lens_q, q_len, is_causal, sliding_window, attention_mask)
    if attention_mask is None:
        causal = q_len > 1 and is_causal
        if causal:
            # Prefill into an empty static cache: its slots beyond the prompt hold nothing yet.
            key, value = key[:, :, :q_len], value[:, :, :q_len]
        if sliding_window is not None:
            window = (sliding_window - 1, None)
    else:
        attention_mask = attention_mask[..., : key.shape[2]]
    if position_bias is not None:
        attention_mask = with_bias(attention_mask, position_bias[..., : key.shape[2]])
    config = getattr(module, "config", None)
    head_map, value_head_map = layer_maps(
        config,
        layer_index(module),
        query.shape[1],
        key.shape[1],
        value.shape[1],
    )
    if not torch.compiler.is_compiling():
        _guarded(config, value_head_map is not None or not head_map.is_uniform)
    return {
        "q": query.transpose(1, 2),
        "k": key.transpose(1, 2),
        "v": value.transpose(1, 2),
        "head_map": head_map,
        "value_head_map": value_head_map,
        "causal": causal,
        "scale": scaling,
        "window": window,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "attn_mask": attention_mask,
        "layout": "bshd",
    }


def with_bias(attention_mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive mask of a bias and a mask."""
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, -math.inf)
    return bias + attention_mask


def _guarded(config: object, uneven: bool) -> None:
    """Put the guard of uneven maps back: transformers takes it out of a config that it loads."""
    if uneven and not hasattr(config, IMPLEMENTATION_FIELD):
        guard(config)


@cache
def _keep_guards() -> None:
    """Put the guard back into the config of every model that is built from now on: it may be saved
    again without having run."""

    def look(_: nn.Module, __: str, part: nn.Module | None) -> None:
        config = None if part is None else part.__dict__.get("config")
        if getattr(config, KEY_FIELD, None) is not None:
            with suppress(ValueError, TypeError):  # wrong maps are told when the model runs
                _guarded(config, uneven=True)

    nn.modules.module.register_module_module_registration_hook(look)


def _packed(
    offsets: Tensor, tokens: int, causal: bool, window: int | None, mask: Tensor | None
) -> Tensor:
    """A mask ``[1, 1, tokens, tokens]`` with attention inside each packed sequence only."""
    position = torch.arange(tokens, device=offsets.device)
    sequence = torch.bucketize(position, offsets[1:-1], right=True)
    visible = sequence[:, None] == sequence
    if causal:
        visible &= position[:, None] >= position
    if window is not None:
        visible &= position[:, None] - position < window
    visible = visible[None, None]
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.where(visible, -math.inf)
