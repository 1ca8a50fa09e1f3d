"""The study of kept keys: as many in all as the part says, and the rows that it has."""

import torch

from benchmarks.measure.timing import Settings
from benchmarks.studies.kept import KV_HEADS, SCORED, WHOLE, budgets, caches, measure


def test_budgets_add_up():
    for total in (8, 100, 4096):
        counts = budgets(total, KV_HEADS)
        assert sum(counts) == total and counts == sorted(counts) and len(set(counts)) > 1


def test_caches_hold_the_part():
    found = caches(64, 0.25, torch.float32, 0)
    lengths = [cache.lengths for cache in found.values()]
    assert [int(x.sum()) for x in lengths] == [64 * KV_HEADS, 16 * KV_HEADS, 16 * KV_HEADS]
    assert len(lengths[1].unique()) == 1 and len(lengths[2].unique()) > 1


def test_rows():
    settings = Settings(seconds=0, least=1, warmup_seconds=0)
    rows = measure(64, 0.5, torch.float32, settings, copies=1)
    names = [row["contestant"] for row in rows]
    assert names[:2] == [WHOLE, SCORED] and names[2:] == [
        "50% of the keys", "50% of the keys, uneven budgets",
    ]  # fmt: skip
    assert rows[0]["times"] == 1 and all(row["tokens_per_second"] > 0 for row in rows)
