"""A small random model of every family, its inputs, and its function with expanded K and V."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gqa_kernels import HeadMap
from gqa_kernels.integrations.transformers.versions import installed
from gqa_kernels.models.families import attention_layers, layer_weights
from tests.tiny_models import VOCABULARY, batch

HEADS, DIM = 6, 8
WIDTH = HEADS * DIM
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {"vocab_size": VOCABULARY, "initializer_range": 0.2, **TOKENS}
CONFIGS = {
    "llama": dict(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, **DECODER,
    ),
    "qwen3": dict(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=3, head_dim=DIM, **DECODER,
    ),
    "gemma3_text": dict(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=3, head_dim=DIM, query_pre_attn_scalar=DIM, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], **DECODER,
    ),
    "opt": dict(
        hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=2, num_attention_heads=HEADS,
        word_embed_proj_dim=WIDTH, max_position_embeddings=64, init_std=0.2, dropout=0.0, **DECODER,
    ),
    "gpt2": dict(n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=64, **DECODER),
    "gpt_neox": dict(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        rotary_pct=0.5, **DECODER,
    ),
    "bert": dict(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        max_position_embeddings=64, **DECODER,
    ),
    "vit": dict(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        image_size=16, patch_size=4, initializer_range=0.2,
    ),
    "t5": dict(
        d_model=WIDTH, d_kv=DIM, d_ff=64, num_layers=2, num_heads=HEADS, vocab_size=VOCABULARY,
        decoder_start_token_id=0, **TOKENS,
    ),
}  # fmt: skip
_LLAMA = {**CONFIGS["llama"], "num_key_value_heads": 3}
# Families whose attention is LLaMA's. A few tests take them; what differs is outside attention.
LLAMA_LIKE = {
    "mistral": _LLAMA,
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "qwen2": _LLAMA,
    "qwen2_moe": {
        **_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "qwen3_moe": {
        **_LLAMA, "head_dim": DIM, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "gemma": {**_LLAMA, "head_dim": DIM},
    "gemma2": {**_LLAMA, "head_dim": DIM},
    "olmo": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "starcoder2": _LLAMA,
    "arcee": _LLAMA,
    "nemotron": _LLAMA,
}  # fmt: skip
# transformers 4 names the modules of the other families otherwise.
FAMILIES = tuple(CONFIGS) if installed() >= (5, 0) else ("llama", "qwen3")
GROUPED = ("qwen3", "gemma3_text", *LLAMA_LIKE)  # parents with fewer KV heads than query heads
DECODERS = tuple(
    n for n in ("llama", "qwen3", "gemma3_text", "opt", "gpt2", "gpt_neox") if n in FAMILIES
)
UNEVEN = (  # differing counts per layer, and for K and V
    (HeadMap([0, 1, 0, 2, 0, 2]), HeadMap([1, 1, 0, 0, 2, 3])),
    (HeadMap([1, 0, 0, 0, 0, 1]), HeadMap([0, 0, 0, 0, 1, 0])),
)


def tiny(family: str) -> nn.Module:
    """In eval mode; every bias and norm random, so that none can be forgotten.

    Skips the test if the installed transformers has the family's modules under other names.
    """
    if family not in (*FAMILIES, *LLAMA_LIKE):
        pytest.skip(f"{family} needs transformers 5")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CONFIGS, **LLAMA_LIKE}[family])
    kind = {"bert": AutoModel, "vit": AutoModel, "t5": AutoModelForSeq2SeqLM}
    model = kind.get(family, AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1 if "norm" in name.lower() or "ln_" in name else 0, 0.3)
    return model


def inputs(family: str) -> dict[str, Tensor]:
    """Padded rows of tokens, or two images."""
    if family == "vit":
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    given = batch([9, 5], "right")
    if family == "t5":
        given["decoder_input_ids"] = batch([7, 7], "right", seed=3)["input_ids"]
    return given


@torch.no_grad()
def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state, of what is not padding."""
    result = model(**given)
    states = result.logits if hasattr(result, "logits") else result.last_hidden_state
    if "attention_mask" in given and "decoder_input_ids" not in given:
        return states[given["attention_mask"].bool()]
    return states


def maps_for(model: nn.Module) -> list[tuple[HeadMap, HeadMap]]:
    return [UNEVEN[layer.index % 2] for layer in attention_layers(model)]


def stock(child: nn.Module, parent: nn.Module) -> nn.Module:
    """The child's function in the parent's own class: K and V expanded, transformers' attention.

    Written apart from ``convert``: q, k and v go where the family's documentation says.
    """
    model = type(parent)(parent.config).eval()
    model.load_state_dict(
        {n: t for n, t in child.state_dict().items() if t.shape == parent.state_dict()[n].shape},
        strict=False,
    )
    places = zip(attention_layers(child), attention_layers(model), strict=True)
    with torch.no_grad():
        for ours, theirs in places:
            weights = layer_weights(ours)
            expanded = {
                "q": (weights.q, weights.q_bias),
                "k": _read(weights.k, weights.k_bias, weights.key_map, theirs.key_map),
                "v": _read(weights.v, weights.v_bias, weights.value_map, theirs.value_map),
            }
            _fill(theirs.module, parent.config.model_type, expanded)
    model.set_attn_implementation("eager")
    return model


def _read(weight, bias, head_map, into):
    """Each of the stock model's KV heads as the first query head that reads it sees it."""
    heads = [head_map[group[0]] for group in into.groups]
    return weight[heads], None if bias is None else bias[heads]


def _fill(module, model_type, parts):
    if model_type == "gpt2":
        weight = torch.cat([w.flatten(0, 1) for w, _ in parts.values()])
        module.c_attn.weight.copy_(weight.T)
        module.c_attn.bias.copy_(torch.cat([b.flatten() for _, b in parts.values()]))
        return
    if model_type == "gpt_neox":
        weight = torch.stack([w for w, _ in parts.values()], 1)  # [H, 3, D, d]
        module.query_key_value.weight.copy_(weight.flatten(0, 2))
        module.query_key_value.bias.copy_(torch.stack([b for _, b in parts.values()], 1).flatten())
        return
    names = {"bert": ("query", "key", "value"), "t5": ("q", "k", "v")}
    for name, (weight, bias) in zip(
        names.get(model_type, ("q_proj", "k_proj", "v_proj")), parts.values(), strict=True
    ):
        getattr(module, name).weight.copy_(weight.flatten(0, 1))
        if bias is not None:
            getattr(module, name).bias.copy_(bias.flatten())
