"""The decode benchmark on a tiny model: same tokens, true bytes, rows that can be gone on with."""

import torch
from transformers import DynamicCache

from benchmarks.studies.generate import STOCK, contestants, held_bytes, run
from tests.tiny_models import batch, tiny

CONTEXT, STEPS, TEXT = 70, 5, 9


def test_rows():
    model = tiny()
    model.set_attn_implementation("sdpa")
    found = contestants(model, "reference")
    ids = batch([CONTEXT + 1], "left")["input_ids"]
    rows = {row["contestant"]: row for row in run(found, ids, STEPS, 2, TEXT)}
    assert list(rows) == list(found)
    assert next(iter(rows)) == STOCK
    for name, row in rows.items():
        assert row["key"] == f"{CONTEXT} {name}"
        assert 0 < row["low"] <= row["tokens_per_second"] <= row["high"]
        if "int8" not in name:
            assert row["tokens_as_stock"] == row["text"] == TEXT
    dense = 2 * 2 * 16 * 2 * 4  # bytes of a token: layers, KV heads, dim, K and V, fp32
    assert rows[STOCK]["kv_bytes"] == rows["ours, DynamicCache"]["kv_bytes"] == dense * CONTEXT
    assert rows["ours, PagedCache"]["kv_bytes"] == dense * 128  # two pages
    assert rows["ours, PagedCache int8"]["kv_bytes"] == dense * 128 // 64 * 20
    assert rows["ours, PagedCache, uneven"]["kv_bytes"] == dense * 128 // 2 * 5


def test_bytes_of_views_are_those_of_what_they_hold():
    """A cropped DynamicCache is a view: its storage keeps the tokens that were cut off."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), 0)
    cache.crop(-4)
    assert held_bytes(cache) == 2 * 2 * 10 * 4 * 4
