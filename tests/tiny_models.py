"""Small random Hugging Face models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert, random_split
from gqa_kernels.integrations.transformers.versions import installed
from gqa_kernels.models.families import attention_layers

VOCABULARY = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss")
OF_FAMILY = {  # what makes the family's attention its own: softcap, sinks, alternating windows
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0, "sliding_window": 8},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
}


def tiny(
    model_type: str = "llama", num_heads: int = 6, num_kv_heads: int = 2, **config
) -> nn.Module:
    """A random causal LM of two layers, in eval mode; weights large enough to tell maps apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16 * num_heads,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **OF_FAMILY.get(model_type, {}),
            **config,
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:  # biases start at zero
        for projection in layer.self_attn.children():
            if getattr(projection, "bias", None) is not None:
                nn.init.normal_(projection.bias)
        if hasattr(layer.self_attn, "sinks"):
            nn.init.normal_(layer.self_attn.sinks)
    return model


def split(model: nn.Module, num_kv_heads: int, seed: int = 0) -> nn.Module:
    """The model with uneven maps, another one for each layer, on our attention."""
    if model.config.model_type == "gemma3_text" and installed() < (5, 0):
        pytest.skip("gemma3_text can't be converted with transformers 4")
    layers = attention_layers(model)
    maps = [random_split(layer.key_map, num_kv_heads, seed + layer.index) for layer in layers]
    child = convert(model, maps, merging="none")
    child.set_attn_implementation("asym_gqa")
    return child


def expanded(model: nn.Module) -> nn.Module:
    """The same function with a KV head per query head, on torch's SDPA (eager where it lacks
    softcap or sinks)."""
    num_heads = model.config.num_attention_heads
    maps = [HeadMap.uniform(num_heads, num_heads)] * model.config.num_hidden_layers
    parent = convert(model, maps, merging="none")
    eager = model.config.model_type in OF_FAMILY
    parent.set_attn_implementation("eager" if eager else "sdpa")
    return parent


def write_tokenizer(folder: Path) -> None:
    """One word per token, ``w0``, ``w1`` and so on, for servers that take text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def batch(lengths: list[int], side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens of these lengths, padded on the left or on the right."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
    if side == "right":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}
