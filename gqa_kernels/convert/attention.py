"""Attention classes of converted models whose own forward assumes as many KV as query heads.

Most families in transformers reshape K and V by the head dim, so that any number of KV heads works;
GPT-2 splits its fused projection by ``split_size``, which ``projections.mark`` sets. OPT (reshapes
by the number of heads) and GPT-NeoX (q, k and v head by head) need another forward. ``install``
gives it to one attention module of one model by changing its class, nothing else is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from ..models.projections import FUSED_HEADS


def install(module: nn.Module, adapter: str | None) -> None:
    """Let an attention module run with fewer KV heads; ``adapter`` as in ``models.families``."""
    if adapter is not None and not getattr(module, "is_asym", False):
        module.__class__ = _ADAPTERS[adapter]()


@cache
def _opt() -> type[nn.Module]:
    from transformers.models.opt import modeling_opt

    takes = Forward(modeling_opt.OPTAttention, "hidden_states", "attention_mask")

    class AsymOPTAttention(modeling_opt.OPTAttention):
        """OPT's attention with any number of KV heads."""

        is_asym = True

        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            (hidden_states, attention_mask), cache, options = takes.read(args, options)
            # OPT scales q, not the scores: the same order here, so that results are the same.
            q = _heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
            k = _heads(self.k_proj(hidden_states), self.head_dim)
            v = _heads(self.v_proj(hidden_states), self.head_dim)
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            out, weights = _interface(modeling_opt, self)(
                self, q, k, v, attention_mask,
                dropout=self.dropout if self.training else 0.0, scaling=1.0, **options,
            )  # fmt: skip
            return self.out_proj(out.flatten(2)), weights

    return AsymOPTAttention


@cache
def _gpt_neox() -> type[nn.Module]:
    from transformers.models.gpt_neox import modeling_gpt_neox

    takes = Forward(
        modeling_gpt_neox.GPTNeoXAttention, "hidden_states", "attention_mask", "position_embeddings"
    )

    class AsymGPTNeoXAttention(modeling_gpt_neox.GPTNeoXAttention):
        """GPT-NeoX's attention with its fused projection concatenated: ``[q | k | v]``."""

        is_asym = True

        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            given, cache, options = takes.read(args, options)
            hidden_states, attention_mask, position_embeddings = given
            sizes = [count * self.head_size for count in getattr(self, FUSED_HEADS)]
            parts = self.query_key_value(hidden_states).split(sizes, -1)
            q, k, v = (_heads(part, self.head_size) for part in parts)
            q, k = modeling_gpt_neox.apply_rotary_pos_emb(q, k, *position_embeddings)
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            out, weights = _interface(modeling_gpt_neox, self)(
                self, q, k, v, attention_mask, scaling=self.scaling,
                dropout=self.attention_dropout if self.training else 0.0, **options,
            )  # fmt: skip
            return self.dense(out.flatten(2)), weights

    return AsymGPTNeoXAttention


class Forward:
    """What the ``forward`` of a transformers class takes, for one that replaces it.

    transformers renames arguments: the cache was ``layer_past``, ``past_key_values`` and is
    ``cache``. So the cache is found by its type, and names are those of the installed release.

    Args:
        replaced: the class.
        needed: names of the arguments that the replacement reads.

    Raises:
        NotImplementedError: ``replaced.forward`` does not take one of them.
    """

    # Named arguments that change nothing here, in the releases that were tested.
    IGNORED = ("output_attentions", "use_cache", "cache_position", "position_ids")

    def __init__(self, replaced: type[nn.Module], *needed: str):
        parameters = list(inspect.signature(replaced.forward).parameters.values())[1:]
        self.name = replaced.__name__
        self.positional = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        self.needed = needed
        for name in needed:
            if name not in self.positional:
                raise NotImplementedError(
                    f"{self.name}.forward must take {name}, got a transformers "
                    f"{version('transformers')} in which it takes {', '.join(self.positional)}"
                )

    def read(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[list[Any], Any, dict[str, Any]]:
        """The needed arguments, the cache or None, and the options of the attention function.

        Raises:
            NotImplementedError: an argument that is not known has a value.
        """
        from transformers.cache_utils import Cache

        given = {**dict(zip(self.positional, args, strict=False)), **options}
        caches = {name: x for name, x in given.items() if isinstance(x, Cache)}
        found = [given.pop(name, None) for name in self.needed]
        for name in caches:
            del given[name]
        for name in self.positional:
            value = given.pop(name, None)
            if value is not None and value is not False and name not in self.IGNORED:
                raise NotImplementedError(
                    f"{self.name}.forward of a converted model must get no {name}, got a "
                    f"{type(value).__name__} from transformers {version('transformers')}"
                )
        return found, next(iter(caches.values()), None), given


_ADAPTERS: dict[str, Callable[[], type[nn.Module]]] = {"opt": _opt, "gpt_neox": _gpt_neox}


def _heads(states: Tensor, head_dim: int) -> Tensor:
    """``[B, S, H * D]`` -> ``[B, H, S, D]``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _interface(modeling: Any, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model's config asks for."""
    name = module.config._attn_implementation
    if name in (None, "eager"):
        return modeling.eager_attention_forward
    return modeling.ALL_ATTENTION_FUNCTIONS[name]
