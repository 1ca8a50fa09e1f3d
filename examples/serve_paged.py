"""Serve an uneven model in transformers with a paged, quantised cache.

The model is small and random. With a converted checkpoint, replace ``small_model`` by
``AutoModelForCausalLM.from_pretrained("child")``.

    python examples/serve_paged.py
"""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from gqa_kernels.integrations.transformers import PagedCache, register


def small_model():
    config = LlamaConfig(
        vocab_size=256, hidden_size=192, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3,
    )  # fmt: skip
    config.kv_head_map = [[0, 1, 0, 2, 0, 0], [2, 0, 1, 1, 2, 1]] * 2  # one list per layer
    return AutoModelForCausalLM.from_config(config, attn_implementation=register()).eval()


def main():
    torch.manual_seed(0)
    model = small_model()
    prompts = torch.randint(3, 256, (2, 300))
    mask = torch.ones_like(prompts)
    mask[1, :200] = 0  # a short prompt, padded on the left
    options = dict(
        attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    plain = DynamicCache()
    expected = model.generate(prompts, past_key_values=plain, **options)
    plain_bytes = sum(
        x.numel() * x.element_size() for layer in plain.layers for x in (layer.keys, layer.values)
    )
    print(f"transformers' cache: {plain_bytes / 1024:.0f} KiB")
    for format in (None, "int8", "int4"):
        cache = PagedCache(model.config, format=format)
        tokens = model.generate(prompts, past_key_values=cache, **options)
        same = (tokens == expected)[:, 300:].float().mean()
        print(f"PagedCache, {format or 'fp32'}: {cache.nbytes / 1024:.0f} KiB, "
              f"{same:.0%} of the tokens are those of the first run")  # fmt: skip


if __name__ == "__main__":
    main()
