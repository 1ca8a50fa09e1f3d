"""Models with linear attention, convolutions, or both beside attention, with PagedCache; and latent
attention, whose models expand what they cache."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gqa_kernels.integrations.transformers import PagedCache, register
from gqa_kernels.integrations.transformers.hybrid import LinearAttentionLayer
from tests.integrations.releases import CACHE
from tests.tiny_models import batch

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5
COMMON = dict(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
STATES = {
    "qwen3_next": dict(
        num_hidden_layers=4, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "lfm2": dict(
        num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "falcon_h1": dict(
        num_hidden_layers=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4,
    ),
}  # fmt: skip
MODELS = {name: sizes for name, sizes in STATES.items() if name in CONFIG_MAPPING}
if not hasattr(LinearAttentionLayer, "update_conv_state"):  # before transformers 5.10
    MODELS = {}
LATENT = dict(
    num_hidden_layers=2, num_key_value_heads=6, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=2,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
)  # fmt: skip


def made(name, sizes=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON | (MODELS[name] if sizes is None else sizes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, inputs, cache, chunks):
    """Logits of a text that comes in chunks, of the tokens that are not padding."""
    found, end = [], 0
    for size in chunks:
        begin, end = end, end + size
        out = model(
            input_ids=inputs["input_ids"][:, begin:end],
            attention_mask=inputs["attention_mask"][:, :end], use_cache=True, **{CACHE: cache},
        )  # fmt: skip
        found.append(out.logits)
    return torch.cat(found, 1)[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[19], [9, 1, 1, 8]], ids=["whole", "chunks"])
def test_logits(name, chunks):
    model, inputs = made(name), batch([19], "left")
    expected = logits(model, inputs, DynamicCache(config=model.config), chunks)
    model.set_attn_implementation(register())
    found = logits(model, inputs, PagedCache(model.config, page_size=4), chunks)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("lengths", [[13], [13, 6]], ids=["whole", "padded"])
def test_generated_tokens(name, lengths, options):
    model, inputs = made(name), batch(lengths, "left")
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    expected = model.generate(**inputs, **options).tolist()
    model.set_attn_implementation(register())
    cache = PagedCache(model.config, page_size=4)
    assert model.generate(**inputs, **options, **{CACHE: cache}).tolist() == expected


@pytest.mark.parametrize("name", MODELS)
def test_reset_rows_and_memory(name):
    """A cache that was reset is as a new one; rows are chosen in every kind of layer."""
    model, inputs = made(name), batch([9, 9], "left")
    model.set_attn_implementation(register())
    cache = PagedCache(model.config, page_size=4)
    assert cache.nbytes == 0
    first = logits(model, inputs, cache, [9])
    held = cache.nbytes
    keys = sum(layer.pool.k.untyped_storage().nbytes() for layer in cache.layers
               if getattr(layer, "pool", None) is not None)  # fmt: skip
    assert held > 2 * keys > 0  # keys and values, and states
    cache.reset()
    torch.testing.assert_close(logits(model, inputs, cache, [9]), first)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    token = {"input_ids": torch.tensor([[5], [5]]), "attention_mask": torch.ones(2, 10)}
    with torch.no_grad():
        found = model(**token, use_cache=True, **{CACHE: cache}).logits
        alone = PagedCache(model.config, page_size=4)
        second = {key: x[1:] for key, x in inputs.items()}
        model(**second, use_cache=True, **{CACHE: alone})
        one = {key: x[:1] for key, x in token.items()}
        expected = model(**one, use_cache=True, **{CACHE: alone}).logits
    torch.testing.assert_close(found, expected.expand_as(found), **CLOSE)


def test_other_kinds_are_refused():
    config = AutoConfig.for_model("llama", **COMMON, num_hidden_layers=2)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(NotImplementedError, match="layer_types with 'chunked_attention"):
        PagedCache(config)


@pytest.mark.parametrize("name", MODELS)
def test_budgets_need_attention(name):
    config = AutoConfig.for_model(name, **COMMON | MODELS[name])
    budgets = [[(1, 4), None]] * config.num_hidden_layers
    with pytest.raises(NotImplementedError, match="budgets must be None in layers of"):
        PagedCache(config, budgets=budgets)


@pytest.mark.skipif("deepseek_v3" not in CONFIG_MAPPING, reason="transformers has no DeepSeek-V3")
@pytest.mark.parametrize("chunks", [[19], [9, 1, 1, 8]], ids=["whole", "chunks"])
def test_latent_attention(chunks):
    """Keys of 24 and values of 12, over transformers' own cache of latents."""
    model, inputs = made("deepseek_v3", LATENT), batch([19], "left")
    expected = logits(model, inputs, DynamicCache(config=model.config), chunks)
    model.set_attn_implementation(register())
    found = logits(model, inputs, DynamicCache(config=model.config), chunks)
    torch.testing.assert_close(found, expected, **CLOSE)
