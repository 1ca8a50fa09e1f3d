"""Models whose layers differ in heads, head dims or windows, with PagedCache."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gqa_kernels.integrations.transformers import PagedCache, register
from tests.integrations.releases import CACHE
from tests.integrations.test_transformers_hybrid import CLOSE, logits, made
from tests.tiny_models import batch

KINDS = ["sliding_attention", "full_attention"] * 2
LAYERS = {
    # Another number of query heads in each layer.
    "laguna": dict(
        num_hidden_layers=4, head_dim=16, num_attention_heads_per_layer=[6, 2, 4, 6],
        layer_types=KINDS, sliding_window=6, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    # Keys of 24 and values of 16; sinks and twice the KV heads where the window is.
    "mimo_v2_flash": dict(
        num_hidden_layers=4, num_attention_heads=8, head_dim=24, v_head_dim=16, layer_types=KINDS,
        sliding_window=6, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=1, topk_group=1,
    ),
    # Other head dims and KV heads in the global layers.
    "gemma4_text": dict(
        num_hidden_layers=4, head_dim=16, global_head_dim=32, num_global_key_value_heads=1,
        layer_types=KINDS, sliding_window=6, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=64,
    ),
}  # fmt: skip
NAMES = [name for name in LAYERS if name in CONFIG_MAPPING]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [[19], [9, 1, 1, 8]], ids=["whole", "chunks"])
def test_logits(name, chunks):
    model, inputs = made(name, LAYERS[name]), batch([19], "left")
    expected = logits(model, inputs, DynamicCache(config=model.config), chunks)
    model.set_attn_implementation(register())
    found = logits(model, inputs, PagedCache(model.config, page_size=4), chunks)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[13], [13, 6]], ids=["whole", "padded"])
def test_generated_tokens(name, lengths):
    model, inputs = made(name, LAYERS[name]), batch(lengths, "left")
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options).tolist()
    model.set_attn_implementation(register())
    cache = PagedCache(model.config, page_size=4)
    assert model.generate(**inputs, **options, **{CACHE: cache}).tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_layers_store_what_they_have(name):
    """Pages are as wide as each layer's own heads and head dims."""
    model, inputs = made(name, LAYERS[name]), batch([19], "left")
    stock = DynamicCache(config=model.config)
    logits(model, inputs, stock, [19])
    model.set_attn_implementation(register())
    cache = PagedCache(model.config, page_size=4)
    logits(model, inputs, cache, [19])
    for layer, other in zip(cache.layers, stock.layers, strict=True):
        for mine, theirs in ((layer.pool.k, other.keys), (layer.pool.v, other.values)):
            assert (mine.shape[1], mine.shape[3]) == (theirs.shape[1], theirs.shape[3])
