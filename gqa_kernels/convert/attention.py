"""Attention classes of converted models whose own forward assumes as many KV as query heads.

Most families in transformers reshape K and V by the head dim, so that any number of KV heads works;
GPT-2 splits its fused projection by ``split_size``, which ``projections.mark`` sets. OPT (reshapes
by the number of heads) and GPT-NeoX (q, k and v head by head) need another forward. ``install``
gives it to one attention module of one model by changing its class, nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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

    class AsymOPTAttention(modeling_opt.OPTAttention):
        """OPT's attention with any number of KV heads."""

        is_asym = True

        def forward(
            self,
            hidden_states: Tensor,
            past_key_values: Any = None,
            attention_mask: Tensor | None = None,
            output_attentions: bool = False,
            **options,
        ) -> tuple[Tensor, Tensor | None]:
            # OPT scales q, not the scores: the same order here, so that results are the same.
            q = _heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
            k = _heads(self.k_proj(hidden_states), self.head_dim)
            v = _heads(self.v_proj(hidden_states), self.head_dim)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            out, weights = _interface(modeling_opt, self)(
                self, q, k, v, attention_mask,
                dropout=self.dropout if self.training else 0.0, scaling=1.0, **options,
            )  # fmt: skip
            return self.out_proj(out.flatten(2)), weights

    return AsymOPTAttention


@cache
def _gpt_neox() -> type[nn.Module]:
    from transformers.models.gpt_neox import modeling_gpt_neox

    class AsymGPTNeoXAttention(modeling_gpt_neox.GPTNeoXAttention):
        """GPT-NeoX's attention with its fused projection concatenated: ``[q | k | v]``."""

        is_asym = True

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None,
            layer_past: Any = None,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            **options,
        ) -> tuple[Tensor, Tensor | None]:
            sizes = [count * self.head_size for count in getattr(self, FUSED_HEADS)]
            parts = self.query_key_value(hidden_states).split(sizes, -1)
            q, k, v = (_heads(part, self.head_size) for part in parts)
            q, k = modeling_gpt_neox.apply_rotary_pos_emb(q, k, *position_embeddings)
            if layer_past is not None:
                k, v = layer_past.update(k, v, self.layer_idx)
            out, weights = _interface(modeling_gpt_neox, self)(
                self, q, k, v, attention_mask, scaling=self.scaling,
                dropout=self.attention_dropout if self.training else 0.0, **options,
            )  # fmt: skip
            return self.dense(out.flatten(2)), weights

    return AsymGPTNeoXAttention


_ADAPTERS: dict[str, Callable[[], type[nn.Module]]] = {"opt": _opt, "gpt_neox": _gpt_neox}


def _heads(states: Tensor, head_dim: int) -> Tensor:
    """``[B, S, H * D]`` -> ``[B, H, S, D]``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _interface(modeling: Any, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model's config asks for."""
    return modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, modeling.eager_attention_forward
    )
