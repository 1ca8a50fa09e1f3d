"""The study of cache formats on a tiny model: fewer bytes, more error, and the table of it."""

import torch

from benchmarks.studies.formats import FORMATS, name_of, run, table
from gqa_kernels.integrations.transformers import register
from tests.tiny_models import VOCABULARY, tiny


def test_rows_and_table():
    model = tiny()
    model.set_attn_implementation(register())
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, VOCABULARY, (2, 20 + 8 + 1), generator=generator)
    rows = run(model, texts, context=20)
    assert [row["key"] for row in rows] == [name_of(*format) for format in FORMATS]
    found = {row["key"]: row for row in rows}
    exact = found["exact"]
    assert exact["divergence"] == 0 and exact["same_choice"] == 1 and exact["tokens"] == 16
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert exact["bytes_per_token"] == 4 * numbers
    scales = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads
    assert found["int8"]["bytes_per_token"] == numbers + scales
    assert found["int4, zeros"]["bytes_per_token"] == numbers // 2 + 2 * scales
    assert 0 < found["int8"]["divergence"] < found["int4"]["divergence"]
    lines = table(rows).splitlines()
    assert len(lines) == 4 + len(rows) and all(line.count("|") == 6 for line in lines[2:])
