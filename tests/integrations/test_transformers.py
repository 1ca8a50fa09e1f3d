"""attn_implementation="asym_gqa" against the same models with expanded K and V on torch's SDPA."""

import builtins
import warnings

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.integrations.transformers import register
from tests.integrations.releases import CACHE, needs_5
from tests.tiny_models import FAMILIES, batch, expanded, split, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture(params=FAMILIES)
def pair(request):
    """A model with uneven maps, 6 query heads over 4 KV heads, and its expansion."""
    model = split(tiny(request.param), num_kv_heads=4)
    return model, expanded(model)


@torch.no_grad()
def logits(model, inputs):
    """Logits of the tokens that are not padding."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[17], [17, 9, 1]], ids=["whole", "padded"])
def test_logits(pair, lengths, side):
    inputs = batch(lengths, side)
    ours, theirs = (logits(model, inputs) for model in pair)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[7], [7, 3]], ids=["whole", "padded"])
def test_generated_tokens(pair, lengths, cache):
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    inputs = batch(lengths, "left")
    ours, theirs = (model.generate(**inputs, **options) for model in pair)
    assert ours.tolist() == theirs.tolist()


def test_chunked_prefill(pair):
    ids = batch([12], "left")["input_ids"]
    ours, theirs = pair
    with torch.no_grad():
        first = ours(ids[:, :7], use_cache=True)
        rest = ours(ids[:, 7:], **{CACHE: getattr(first, CACHE)}).logits
        whole = theirs(ids).logits[:, 7:]
    torch.testing.assert_close(rest, whole, **CLOSE)


@pytest.mark.parametrize("lengths", [[9], [9, 5]], ids=["whole", "padded"])
def test_gradients(pair, lengths):
    inputs = batch(lengths, "right")
    grads = []
    for model in pair:
        model.train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lengths", [[40], [40, 23]], ids=["whole", "padded"])
def test_sliding_window(lengths):
    parent = tiny("mistral", sliding_window=8)
    model = split(parent, num_kv_heads=4)
    inputs = batch(lengths, "left")
    torch.testing.assert_close(logits(model, inputs), logits(expanded(model), inputs), **CLOSE)
    generated = [
        m.generate(**inputs, max_new_tokens=12, do_sample=False) for m in (model, expanded(model))
    ]
    assert torch.equal(*generated)


def test_sliding_window_without_a_mask():
    """Some models pass the window and no mask."""
    model = split(tiny("mistral", sliding_window=8), num_kv_heads=4)
    ids = batch([40], "left")["input_ids"]
    with torch.no_grad():
        masked = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}),
                with_kwargs=True,
            )
        torch.testing.assert_close(model(ids).logits, masked, **CLOSE)


@pytest.mark.parametrize("lengths", [[19], [19, 6]], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}),
    ],
    ids=["softcap", "sinks"],
)
def test_other_models_unchanged(model_type, config, lengths):
    """Softcap and sinks, on even maps, against transformers' eager attention."""
    model = tiny(model_type, **config)
    inputs = batch(lengths, "left")
    model.set_attn_implementation("eager")
    theirs = logits(model, inputs)
    model.set_attn_implementation("asym_gqa")
    torch.testing.assert_close(logits(model, inputs), theirs, **CLOSE)


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=6, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1, initializer_factor=2.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("lengths", [[13], [13, 8]], ids=["whole", "padded"])
def test_t5_position_bias(lengths):
    """Relative position bias in encoder and decoder, cross-attention, generation."""
    inputs = batch(lengths, "right")
    decoder_ids = batch([7] * len(lengths), "right", seed=1)["input_ids"]
    logits, tokens = {}, {}
    for name, implementation in (("exact", "eager"), ("eager", "eager"), ("ours", "asym_gqa")):
        model = t5().to(torch.float64 if name == "exact" else torch.float32)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[name] = model(**inputs, decoder_input_ids=decoder_ids).logits.double()
        tokens[name] = model.generate(**inputs, max_new_tokens=10, do_sample=False).tolist()
    theirs, ours = ((logits[name] - logits["exact"]).abs().max() for name in ("eager", "ours"))
    rounding = torch.finfo(torch.float32).eps * logits["exact"].abs().max()
    assert ours <= 2 * theirs + rounding
    assert tokens["ours"] == tokens["eager"]


def test_gradient_of_the_position_bias():
    grads = []
    for implementation in ("eager", "asym_gqa"):
        model = t5()
        model.set_attn_implementation(implementation)
        inputs = batch([9, 5], "right")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        first = model.encoder.block[0].layer[0].SelfAttention
        grads.append(first.relative_attention_bias.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_even_model_equals_sdpa():
    model = tiny()
    inputs = batch([17, 9], "left")
    theirs = logits(model, inputs)
    model.set_attn_implementation("asym_gqa")
    torch.testing.assert_close(logits(model, inputs), theirs, **CLOSE)


def test_separate_value_map():
    parent = tiny(num_heads=5, num_kv_heads=5)
    maps = [(HeadMap([0, 1, 0, 2, 2]), HeadMap([2, 1, 1, 0, 0]))] * 2
    model = convert(parent, maps)
    model.set_attn_implementation("asym_gqa")
    assert model.config.value_head_map == [[2, 1, 1, 0, 0]] * 2
    inputs = batch([17, 9], "left")
    torch.testing.assert_close(logits(model, inputs), logits(expanded(model), inputs), **CLOSE)


def test_save_and_load_keep_the_maps(tmp_path):
    model = split(tiny(), num_kv_heads=4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="asym_gqa")
    assert loaded.config.kv_head_map == model.config.kv_head_map
    inputs = batch([17, 9], "left")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_dropout():
    """In training only; the same on every backend by the generator's seed."""
    model = split(tiny(attention_dropout=0.5), num_kv_heads=4)
    inputs = batch([9], "left")
    without = logits(model, inputs)
    model.train()
    results = []
    for name in ("asym_gqa", register("asym_gqa_reference", backend="reference")):
        model.set_attn_implementation(name)
        torch.manual_seed(3)
        results.append(logits(model, inputs))
    torch.testing.assert_close(*results, **CLOSE)
    assert not torch.allclose(results[0], without, **CLOSE)
    model.eval()
    torch.testing.assert_close(logits(model, inputs), without, **CLOSE)


def test_output_is_contiguous_and_inputs_are_not_copied():
    from gqa_kernels.integrations import transformers as integration

    model = split(tiny(), num_kv_heads=4)
    module = model.model.layers[0].self_attn
    q, k, v = (torch.randn(2, 5, heads, 16).transpose(1, 2) for heads in (6, 4, 4))
    call = integration.attention_call(module, q, k, v, None)
    for name, given in (("q", q), ("k", k), ("v", v)):
        assert call[name].untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    out = integration.asym_gqa(module, q, k, v, None)
    assert out.shape == (2, 5, 6, 16)
    assert out.is_contiguous()


@needs_5  # torch 2.13 doesn't trace the vmap by which transformers 4 makes masks
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_compiled(family):
    inputs = batch([17, 9], "left")
    model = split(tiny(family), num_kv_heads=4)
    eager = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, inputs), eager, **CLOSE)


def test_compiled_without_a_mask():
    ids = batch([17], "left")["input_ids"]
    model = split(tiny(), num_kv_heads=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **CLOSE)


def test_named_backend():
    name = register("asym_gqa_reference", backend="reference")
    model = split(tiny(), num_kv_heads=4)
    inputs = batch([9], "left")
    first = logits(model, inputs)
    model.set_attn_implementation(name)
    torch.testing.assert_close(logits(model, inputs), first, **CLOSE)


class TestErrors:
    def test_too_few_maps(self):
        model = split(tiny(), num_kv_heads=4)
        model.config.kv_head_map = model.config.kv_head_map[:1]
        with pytest.raises(ValueError, match=r"must have a map for layer 1, got 1 maps"):
            model(**batch([5], "left"))

    def test_map_of_wrong_length(self):
        model = split(tiny(), num_kv_heads=4)
        model.config.kv_head_map = [[0, 1, 2, 3]] * 2
        with pytest.raises(ValueError, match=r"kv_head_map\[0\] must have 6 entries.*got 4"):
            model(**batch([5], "left"))

    def test_heads_that_do_not_divide_without_a_map(self):
        model = split(tiny(), num_kv_heads=4)
        model.config.kv_head_map = None
        with pytest.raises(ValueError, match="kv_head_map must say which of 4 KV heads"):
            model(**batch([5], "left"))

    def test_transformers_missing(self, monkeypatch):
        def no_transformers(name, *args, **kwargs):
            if name.split(".")[0] == "transformers":
                raise ImportError("no transformers")
            return real(name, *args, **kwargs)

        real = builtins.__import__
        monkeypatch.setattr(builtins, "__import__", no_transformers)
        with pytest.raises(ImportError, match=r"needs transformers >= 4\.57"):
            register()
