"""Models whose last layers read the keys and values of earlier ones; PagedCache among others."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gqa_kernels.integrations.transformers import PagedCache, register
from tests.integrations.releases import CACHE
from tests.tiny_models import batch

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5
WINDOW = 8
COMMON = dict(
    vocab_size=64, vocab_size_per_layer_input=64, hidden_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_kv_shared_layers=2,
    sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2,
    hidden_size_per_layer_input=16, max_position_embeddings=512, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MODELS = {
    "gemma3n_text": dict(
        intermediate_size=[64] * 4, activation_sparsity_pattern=None, laurel_rank=8
    ),
    "gemma4_text": dict(
        intermediate_size=64, global_head_dim=16, use_double_wide_mlp=False, enable_moe_block=False
    ),
}


@pytest.fixture(params=[name for name in MODELS if name in CONFIG_MAPPING])
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **COMMON, **MODELS[request.param])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    shared = [layer.self_attn.is_kv_shared_layer for layer in model.model.layers]
    assert shared == [False, False, True, True]
    return model


def ours(model):
    model.set_attn_implementation(register())
    return model


def caches(model):
    return {
        "dynamic": DynamicCache(config=model.config),
        "paged": PagedCache(model.config, page_size=4),
    }


@torch.no_grad()
def logits(model, inputs, cache=None, **options):
    """Logits of the tokens that are not padding. transformers 4 shares keys in caches only."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    options = {CACHE: cache, "use_cache": True, **options}
    return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("lengths", [[19], [19, 7]], ids=["whole", "padded"])
def test_logits(model, lengths):
    inputs = batch(lengths, "left")
    expected = logits(model, inputs)
    ours(model)
    for cache in caches(model).values():
        found = logits(model, inputs, cache)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beam"])
@pytest.mark.parametrize("lengths", [[19], [19, 7]], ids=["whole", "padded"])
def test_generated_tokens(model, lengths, options):
    inputs = batch(lengths, "left")
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    expected = model.generate(**inputs, **options).tolist()
    ours(model)
    for cache in caches(model).values():
        assert model.generate(**inputs, **options, **{CACHE: cache}).tolist() == expected


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("lengths", [[19], [19, 7]], ids=["whole", "padded"])
def test_only_the_last_logits(model, lengths, kept):
    """Gemma 4 then leaves all other queries out of the layers that share."""
    inputs = batch(lengths, "left")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        expected = model(**inputs, use_cache=True, **{CACHE: cache}).logits[:, -kept:]
        ours(model)
        for cache in caches(model).values():
            options = {CACHE: cache, "use_cache": True}
            found = model(**inputs, logits_to_keep=kept, **options).logits
            torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_a_prompt_in_chunks(model):
    """Over pages, whole windows behind the first tokens."""
    inputs = batch([29], "left")
    expected = logits(model, inputs)
    cache = PagedCache(ours(model).config, page_size=4)
    found = []
    for part in inputs["input_ids"].split([11, 1, 10, 7], dim=1):
        found.append(model(part, use_cache=True, **{CACHE: cache}).logits[0])
    torch.testing.assert_close(torch.cat(found), expected, **CLOSE)


@torch.no_grad()
def test_keys_are_stored_once(model):
    cache = PagedCache(ours(model).config, page_size=4)
    model(batch([19], "left")["input_ids"], use_cache=True, **{CACHE: cache})
    assert [layer.pool is None for layer in cache.layers] == [False, False, True, True]
    assert cache.get_seq_length() == 19


@torch.no_grad()
def test_keys_of_an_earlier_pass(model):
    """Those that a sharing layer holds must be of the pass that it runs in."""
    cache = PagedCache(ours(model).config, page_size=4)
    module = model.model.layers[1].self_attn
    q, k = torch.zeros(1, 4, 3, 32), torch.zeros(1, 2, 3, 32)

    first, second = (cache.layers[1].update(k, k) for _ in range(2))
    for pair in (first, second):
        cache.layers[1].attend(module, q, *pair, None, "auto")
    cache.layers[1].attend(module, q, *second, None, "auto")  # as often as layers share them
    with pytest.raises(ValueError, match="must run in the forward pass that made them, got keys"):
        cache.layers[1].attend(module, q, *first, None, "auto")


def test_keys_on_another_device(model):
    keys, _ = PagedCache(model.config).layers[0].update(torch.zeros(1, 2, 3, 32), None)
    assert keys.to("cpu") is keys
    with pytest.raises(NotImplementedError, match="must be on one device, got cpu and meta"):
        keys.to("meta")
