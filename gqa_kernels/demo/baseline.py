"""The baseline: expand K and V by the map, then call torch's SDPA. And how our results differ."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .. import attention
from ..attention import asym_gqa_attention
from ..backends.dispatch import select
from ..integrations.transformers import attention_call
from ..integrations.transformers.guards import reads_maps

EXPAND = "expand_sdpa"  # attn_implementation of the baseline
CHECKED = "asym_gqa_checked"  # attn_implementation that runs both and compares


def expand_sdpa(call: dict[str, object]) -> Tensor:
    """The baseline on the arguments of ``asym_gqa_attention``; returns ``[B, Sq, Hq, Dv]``.

    Supports masks and causality, which is all that a LLaMA model uses.
    """
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    key_map = call["head_map"]
    value_map = call["value_head_map"] or key_map
    out = scaled_dot_product_attention(
        q,
        k.index_select(1, key_map.tensor(k.device)),
        v.index_select(1, value_map.tensor(v.device)),
        attn_mask=call["attn_mask"],
        is_causal=call["causal"],
        scale=call["scale"],
    )
    return out.transpose(1, 2).contiguous()


@dataclass
class Comparison:
    """Largest differences seen between our attention and the baseline.

    Attributes:
        max_error: max |ours - baseline| by phase, ``"prefill"`` or ``"decode"``.
        max_value: max |baseline| by phase.
        backend: name of the backend that ran, by phase.
    """

    max_error: dict[str, float] = field(default_factory=dict)
    max_value: dict[str, float] = field(default_factory=dict)
    backend: dict[str, str] = field(default_factory=dict)

    def add(self, ours: Tensor, baseline: Tensor, backend: str) -> None:
        phase = "prefill" if ours.shape[1] > 1 else "decode"
        for seen, tensor in ((self.max_error, ours - baseline), (self.max_value, baseline)):
            seen[phase] = max(seen.get(phase, 0.0), tensor.float().abs().max().item())
        self.backend[phase] = backend


def register_baseline() -> None:
    """Make ``attn_implementation="expand_sdpa"`` available."""
    _register(EXPAND, expand_sdpa)


def register_checked(backend: str) -> Comparison:
    """Make ``attn_implementation="asym_gqa_checked"`` available.

    Returns:
        the differences that it records.
    """
    comparison = Comparison()

    def both(call: dict[str, object]) -> Tensor:
        ours = asym_gqa_attention(**call, backend=backend)
        ran = select(attention.attention_call(**call), backend).name
        comparison.add(ours, expand_sdpa(call), ran)
        return ours

    _register(CHECKED, both)
    return comparison


def _register(name: str, attend) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options
    ) -> tuple[Tensor, None]:
        call = attention_call(module, query, key, value, attention_mask, **options)
        return attend(call), None

    AttentionInterface.register(name, reads_maps(attention))
    AttentionMaskInterface.register(name, sdpa_mask)


@torch.inference_mode()
def compare(model: nn.Module, ids: Tensor, decode_steps: int, backend: str) -> Comparison:
    """Compare every layer over a prefill and some decode steps.

    Args:
        model: a causal LM with maps in its config.
        ids: ``[1, n]`` tokens; the last ``decode_steps`` are decoded one by one.
    """
    comparison = register_checked(backend)
    before = model.config._attn_implementation
    model.set_attn_implementation(CHECKED)
    try:
        out = model(ids[:, :-decode_steps], use_cache=True, logits_to_keep=1)
        for token in ids[:, -decode_steps:].split(1, dim=1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    finally:
        model.set_attn_implementation(before)
    return comparison
