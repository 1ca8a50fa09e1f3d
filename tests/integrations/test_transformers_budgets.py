"""PagedCache(budgets=...): sinks and windows of heads against masks; memory; errors."""

import pytest
import torch
from transformers import DynamicCache

from gqa_kernels.integrations.transformers import PagedCache, register
from tests.integrations.releases import CACHE
from tests.tiny_models import VOCABULARY, split, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5
PAGE = 4
BUDGETS = [(6, 10), None]  # 8 sinks after rounding up to pages


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, count), generator=generator)


def visible(position, budget):
    """What a head of the prompt's cache sees at a later position: the rule in the docstring."""
    keys = torch.arange(position + 1)
    if budget is None:
        return torch.ones_like(keys, dtype=torch.bool)
    sinks = -(-budget[0] // PAGE) * PAGE
    oldest = max(position - budget[1] + 1, 0)  # of the recent ones
    page = (oldest // PAGE) * PAGE  # sinks are whole pages, so pages begin at multiples
    return (keys < sinks) | (keys >= page)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [3, 30, 41])
def test_decode_sees_sinks_and_recent_keys(prompt):
    """Token by token, against stock SDPA with a mask per head."""
    stock, ours = tiny(), tiny()
    stock.set_attn_implementation("sdpa")
    ours.set_attn_implementation("asym_gqa")
    ids = tokens(80)
    caches = DynamicCache(), PagedCache(ours.config, page_size=PAGE, budgets=[BUDGETS] * 2)
    for model, cache in zip((stock, ours), caches, strict=True):
        model(ids[:, :prompt], **{CACHE: cache})
    for position in range(prompt, 80):
        one = slice(position, position + 1)
        seen = [visible(position, budget) for budget in BUDGETS]
        mask = torch.stack([seen[h // 3] for h in range(6)])[None, :, None]
        expected = stock(ids[:, one], attention_mask=mask, **{CACHE: caches[0]}).logits
        found = ours(ids[:, one], **{CACHE: caches[1]}).logits
        torch.testing.assert_close(found, expected, **CLOSE)
    assert caches[1].get_seq_length() == 80


@torch.no_grad()
def test_a_chunk_is_its_tokens_at_once():
    """A chunk of several tokens drops for its first token only."""
    model = tiny()
    model.set_attn_implementation("asym_gqa")
    ids, logits = tokens(60), []
    for budgets in ([[(4, 60), None]] * 2, None):  # a window that is never full
        cache = PagedCache(model.config, page_size=PAGE, budgets=budgets)
        model(ids[:, :30], **{CACHE: cache})
        logits.append(model(ids[:, 30:], **{CACHE: cache}).logits)
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("format", [None, "int8"])
def test_memory_stays_where_it_is(format):
    """All heads streaming: a long text takes no more pages than a short one."""
    model, held = split(tiny(), num_kv_heads=4), []
    for count in (60, 400):
        cache = PagedCache(
            model.config, page_size=PAGE, format=format, budgets=[[(4, 24)] * 4, [(4, 8)] * 4]
        )
        with torch.no_grad():
            model(tokens(count), **{CACHE: cache})
            for i in range(30):
                model(tokens(1, i), **{CACHE: cache})
        held.append(cache.nbytes)
        pages = [(layer._pages.lengths.max() + PAGE - 1) // PAGE for layer in cache.layers]
        assert pages[0] <= 1 + 7 and pages[1] <= 1 + 3
    assert held[0] == held[1]
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


def test_generate_with_layers_of_both_kinds():
    """Budgets that nothing exceeds change nothing; rows of a batch of equal lengths."""
    model = split(tiny(), num_kv_heads=4)
    ids = torch.cat([tokens(20), tokens(20, 1)])
    budgets = [None, [(4, 100), None, (0, 90), None]]
    found = [
        model.generate(ids, max_new_tokens=15, do_sample=False, **{CACHE: cache})
        for cache in (
            PagedCache(model.config, page_size=PAGE),
            PagedCache(model.config, page_size=PAGE, budgets=budgets),
        )
    ]
    assert torch.equal(*found)


def test_errors():
    config = tiny().config
    for budgets, message in (
        ([None], r"budgets must be a list with one entry per layer \(2\), got 1"),
        (5, "budgets must be a list with one entry per layer"),
        ([[(1, 0)], None], r"recent of 1 or more, got \(1, 0\)"),
        ([[3], None], r"a budget must be None or a pair \(sinks, recent\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedCache(config, budgets=budgets)
    with pytest.raises(ValueError, match="num_pages must be None with budgets, got 9"):
        PagedCache(config, num_pages=9, budgets=[BUDGETS] * 2)
    with pytest.raises(NotImplementedError, match="budgets must be None in layers with a sliding"):
        PagedCache(tiny("gemma2").config, budgets=[BUDGETS] * 2)
    cache = PagedCache(config, budgets=[BUDGETS] * 2)
    for name, arguments in (
        ("crop", (-1,)), ("batch_repeat_interleave", (2,)), ("activate_past_recording", ()),
        ("batch_select_indices", (torch.tensor([0]),)), ("reorder_cache", (torch.tensor([0]),)),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="needs every key"):
            getattr(cache, name)(*arguments)
    model = tiny()
    model.set_attn_implementation("asym_gqa")
    with pytest.raises(ValueError, match=r"one entry per KV head of a layer \(2\), got 1"):
        model(tokens(3), **{CACHE: PagedCache(config, budgets=[[(1, 1)]] * 2)})
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(NotImplementedError, match="no padding"):
        model(tokens(3), attention_mask=mask, **{CACHE: cache})
