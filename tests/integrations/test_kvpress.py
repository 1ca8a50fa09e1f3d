"""kvpress's presses on our cache, which drops keys, against kvpress alone, which masks them."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

kvpress = pytest.importorskip(
    "kvpress", reason="kvpress is not installed (it needs transformers before 5.3)"
)

from gqa_kernels.integrations.kvpress import PressedCache, register  # noqa: E402
from gqa_kernels.integrations.transformers.head_pages import HeadPages  # noqa: E402
from tests.tiny_models import VOCABULARY, split, tiny  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5
CONTEXT = 203


def snap(ratio):
    return kvpress.SnapKVPress(compression_ratio=ratio, window_size=8)


def duo(ratio):
    return kvpress.DuoAttentionPress(head_compression_ratio=ratio)


TOKEN_WISE = {
    "SnapKV": snap,
    "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=3),
    "Random": lambda ratio: kvpress.RandomPress(compression_ratio=ratio, seed=3),
    "Knorm": lambda ratio: kvpress.KnormPress(compression_ratio=ratio),
    "TOVA": lambda ratio: kvpress.TOVAPress(compression_ratio=ratio),
    "ExpectedAttention": lambda ratio: kvpress.ExpectedAttentionPress(
        compression_ratio=ratio, n_future_positions=16
    ),
    "PyramidKV": lambda ratio: kvpress.PyramidKVPress(compression_ratio=ratio, window_size=8),
    "ChunkKV": lambda ratio: kvpress.ChunkKVPress(press=snap(ratio), chunk_length=5),
}
HEAD_WISE = {
    "AdaKV-SnapKV": lambda ratio: kvpress.AdaKVPress(snap(ratio)),
    "AdaKV-Random": lambda ratio: kvpress.AdaKVPress(kvpress.RandomPress(ratio, seed=3)),
    "CriticalAdaKV-SnapKV": lambda ratio: kvpress.CriticalAdaKVPress(snap(ratio)),
    "DuoAttention": duo,
    "KVzip": lambda ratio: kvpress.KVzipPress(compression_ratio=ratio),
    "KVzip-layerwise": lambda ratio: kvpress.KVzipPress(ratio, layerwise=True, chunk_size=90),
}
PRESSES = {**TOKEN_WISE, **HEAD_WISE}


class Tokenizer:
    """As much of a tokenizer as KVzip needs."""

    chat_template = None

    def encode(self, text, **_):
        return torch.tensor([[3 + ord(letter) % (VOCABULARY - 3) for letter in text]]).long()


@pytest.fixture(autouse=True)
def without_downloads(monkeypatch):
    """DuoAttention's patterns and KVzip's tokenizer come from elsewhere."""
    pattern = (4, 16, torch.linspace(0, 1, 4).view(2, 2).numpy())
    monkeypatch.setattr(
        kvpress.DuoAttentionPress, "load_attention_pattern", staticmethod(lambda model: pattern)
    )
    loader = SimpleNamespace(from_pretrained=lambda name: Tokenizer())
    monkeypatch.setattr(sys.modules["kvpress.presses.kvzip_press"], "AutoTokenizer", loader)


@pytest.fixture(scope="module")
def models():
    """The same model twice: on SDPA with kvpress's own way, and on our attention."""
    stock, ours = tiny(), tiny()
    stock.set_attn_implementation("sdpa")
    ours.set_attn_implementation(register())
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def context(tokens=CONTEXT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, tokens), generator=generator)


@torch.no_grad()
def compressed(model, cache, press, ids):
    """The cache after the press has seen the context."""
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


@torch.no_grad()
def answered(model, cache, question, start, tokens=10):
    """Logits of a question and of greedy tokens after it, as kvpress's pipeline runs them; then
    the cache without them."""
    before = [cache.get_seq_length(i) for i in range(len(cache.layers))]
    position = torch.arange(start, start + question.shape[1])[None]
    logits = [model(question, past_key_values=cache, position_ids=position).logits]
    chosen = [logits[0][:, -1:].argmax(-1)]
    for i in range(tokens):
        at = position[:, -1:] + 1 + i
        logits.append(model(chosen[-1], past_key_values=cache, position_ids=at).logits)
        chosen.append(logits[-1].argmax(-1))
    pipeline = kvpress.KVPressTextGenerationPipeline
    pipeline._remove_answer_from_cache(None, cache, before)
    return torch.cat(logits, 1), torch.cat(chosen, 1)


@pytest.mark.parametrize("name", PRESSES)
def test_answers_are_those_of_kvpress(models, name):
    """Two questions, one after the other, to the same compressed context.

    kvpress finds no key that several queries of a random model all ignore, so that questions for
    presses of heads have one token.
    """
    caches = DynamicCache(), PressedCache(models[1].config)
    for model, cache in zip(models, caches, strict=True):
        compressed(model, cache, PRESSES[name](0.6), context())
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for seed, tokens in ((1, 1 if name in HEAD_WISE else 4), (2, 1)):
        results = [
            answered(model, cache, context(tokens, seed), CONTEXT)
            for model, cache in zip(models, caches, strict=True)
        ]
        torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
        assert torch.equal(results[1][1], results[0][1])


def test_a_question_of_several_tokens_is_its_tokens_one_by_one(models):
    ours, question, logits = models[1], context(5, 1), []
    cache = compressed(ours, PressedCache(ours.config), HEAD_WISE["AdaKV-SnapKV"](0.6), context())
    for part in (5, 1):
        for begin in range(0, 5, part):
            now, first = slice(begin, begin + part), CONTEXT + begin
            position = torch.arange(first, first + part)[None]
            with torch.no_grad():
                out = ours(question[:, now], past_key_values=cache, position_ids=position)
            logits.append(out.logits)
        for layer in cache.layers:
            layer.keys, layer.values = (x[:, :, :CONTEXT] for x in (layer.keys, layer.values))
    torch.testing.assert_close(torch.cat(logits[1:], 1), logits[0], **CLOSE)


DECODING = {
    "Knorm": lambda: kvpress.DecodingPress(
        base_press=kvpress.KnormPress(), compression_interval=4, target_size=60
    ),
    "SnapKV-then-Knorm": lambda: kvpress.PrefillDecodingPress(
        prefilling_press=snap(0.5),
        decoding_press=kvpress.DecodingPress(
            base_press=kvpress.KnormPress(), compression_interval=5, target_size=40
        ),
    ),
    "DMS": lambda: kvpress.DMSPress(
        kvpress.KnormPress(), threshold=-5.0, sliding_window_size=16, decoding=True
    ),
}


@pytest.mark.parametrize("name", DECODING)
@torch.no_grad()
def test_presses_that_compress_while_decoding(models, name):
    """Under the press all the time; DMS goes on to mask keys of a cache that has dropped some."""
    results, caches = [], (DynamicCache(), PressedCache(models[1].config))
    for model, cache in zip(models, caches, strict=True):
        press = DECODING[name]()
        with press(model):
            model.model(input_ids=context(), past_key_values=cache)
            logits, token = [], context(1, 1)
            for i in range(14):
                position = torch.tensor([[CONTEXT + i]])
                logits.append(model(token, past_key_values=cache, position_ids=position).logits)
                token = logits[-1].argmax(-1)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    lengths = torch.stack([layer._pages.lengths for layer in caches[1].layers])
    if name == "DMS":
        assert len(lengths.unique()) > 1 and lengths.max() < CONTEXT + 14
    else:
        assert caches[0].get_seq_length() == caches[1].get_seq_length() < 70


@pytest.mark.parametrize("name", PRESSES)
def test_memory_falls_by_the_ratio(models, name):
    """At most 0.3x at 4x compression: pages are rounded up for every head."""
    ours, ids = models[1], context(601)
    whole = PressedCache(ours.config)
    with torch.no_grad():
        ours.model(input_ids=ids, past_key_values=whole)
    cache = compressed(ours, PressedCache(ours.config, page_size=8), PRESSES[name](0.75), ids)
    answered(ours, cache, context(1), 601, tokens=0)
    limit = 0.3
    if name == "DuoAttention":  # 3 of 4 heads stream: they keep 20 keys
        limit = 0.25 + 0.75 * 24 / 601 + 0.03
    assert cache.nbytes <= limit * whole.nbytes
    assert not any(getattr(layer.self_attn, "masked_key_indices", None) is not None
                   for layer in ours.model.layers)  # fmt: skip


def test_heads_keep_as_many_keys_as_the_press_says(models):
    cache = PressedCache(models[1].config)
    compressed(models[1], cache, HEAD_WISE["AdaKV-SnapKV"](0.75), context())
    for layer in cache.layers:
        lengths = layer._pages.lengths
        assert lengths.sum() == 2 * 50  # kvpress rounds 203 / 4 down
        assert len(lengths.unique()) == 2
        k = layer.keys
        assert k.shape == (1, 2, CONTEXT, 16)
        assert torch.equal((k != 0).any(-1).sum(-1), lengths)


@pytest.mark.parametrize("format, error", [("int8", 0.05), ("fp8_e4m3", 0.2), ("int4", 1.0)])
def test_quantised_pages(models, format, error):
    """The answers of what was stored: near those of the keys as they are."""
    logits = []
    for stored in (None, format):
        cache = PressedCache(models[1].config, format=stored)
        compressed(models[1], cache, HEAD_WISE["AdaKV-SnapKV"](0.5), context())
        logits.append(answered(models[1], cache, context(3, 1), CONTEXT, tokens=0)[0])
    difference = (logits[1] - logits[0]).abs().max()
    assert 0 < difference < error * logits[0].abs().max()


def test_uneven_maps():
    """Presses that look at no groups run on maps that kvpress itself cannot attend with."""
    model = split(tiny(), num_kv_heads=4)
    model.set_attn_implementation(register())
    logits = []
    for ratio in (0.0, 0.5):
        press = kvpress.AdaKVPress(kvpress.KnormPress(compression_ratio=ratio))
        cache = compressed(model, PressedCache(model.config), press, context())
        logits.append(answered(model, cache, context(3, 1), CONTEXT)[0])
    assert sum(int(layer._pages.lengths.sum()) for layer in cache.layers) == 2 * 4 * 101
    assert not torch.equal(*logits)


def test_generate_goes_on_from_a_compressed_context(models):
    """transformers' own loop: with nothing dropped, the text of an ordinary cache."""
    ids, (stock, ours) = context(40), models
    expected = stock.generate(ids, max_new_tokens=12, do_sample=False)
    cache = PressedCache(ours.config)
    with kvpress.KnormPress(compression_ratio=0.0)(ours):
        found = ours.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)


def test_masks_of_keys_that_were_cropped_since_are_no_error(models):
    """DMS masks keys of an answer, and the pipeline then removes the answer."""
    ours = models[1]
    cache = compressed(ours, PressedCache(ours.config), kvpress.KnormPress(0.0), context(30))
    answered(ours, cache, context(3, 1), 30, tokens=2)
    for layer, block in zip(cache.layers, ours.model.layers, strict=True):
        looked_at = layer.keys, layer.values
        mask = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 29])
        block.self_attn.masked_key_indices = mask
        layer.keys, layer.values = (x[:, :, :25] for x in looked_at)
        assert layer._pages.lengths.tolist() == [[25, 24]]


def test_pages_return_what_is_dropped():
    k, v = torch.randn(2, 2, 3, 40, 8)
    pages = HeadPages(k, v, 4, None)
    pages.append(k.flatten(0, 2), v.flatten(0, 2), [40] * 6, "auto", exact=True)
    whole = pages.nbytes
    kept = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    pages.keep(kept, "auto")
    assert torch.equal(pages.lengths, kept.sum(-1))
    used = (-(-kept.sum(-1) // 4)).sum() * 4 / (6 * 40)
    assert pages.nbytes == whole * used and pages.allocator.num_free_pages == 0
    for x, y in zip((k, v), pages.dense(), strict=True):
        for b in range(2):
            for h in range(3):
                n = int(kept[b, h].sum())
                assert torch.equal(y[b, h, :n], x[b, h, kept[b, h]])
                assert not y[b, h, n:].any()


def test_errors(models):
    ours = models[1]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    ids, cache = context(9).repeat(2, 1), PressedCache(ours.config)
    with pytest.raises(NotImplementedError, match="no padding"), torch.no_grad():
        ours(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="full attention, got sliding windows"):
        PressedCache(tiny("gemma2").config)
    cache = compressed(ours, PressedCache(ours.config), HEAD_WISE["AdaKV-SnapKV"](0.5), context())
    layer = cache.layers[0]
    layer.keys = layer.keys[:, :, 5:]
    with pytest.raises(NotImplementedError, match="must drop keys by masked_key_indices"):
        layer.values = layer.values[:, :, 5:]
    with pytest.raises(NotImplementedError, match="no beam search"):
        cache.reorder_cache(torch.tensor([0]))
