"""Maps in configs: what else may stand there, and how to fix it."""

import pytest
from transformers import LlamaConfig

from gqa_kernels import HeadMap
from gqa_kernels.models.maps import layer_maps, store_maps, stored_maps

HOSTILE = [
    (["a", "b"], r"kv_head_map\[0\] must be a list with a KV head per query head, got 'a'"),
    ([0, 1], r"kv_head_map\[0\] must be a list with a KV head per query head, got 0"),
    (True, "kv_head_map must be a list with a head map per layer, got True"),
    ({"0": [0, 1]}, "kv_head_map must be a list with a head map per layer"),
    ([[0.5] * 6] * 2, r"kv_head_map\[0\]: "),
    ([[0] * 6, [0, -1, 0, 0, 0, 0]], r"kv_head_map\[1\]: "),
    ([[0] * 6, []], r"kv_head_map\[1\]: "),
    ([["0"] * 6] * 2, r"kv_head_map\[0\]: "),
    ([[None] * 6] * 2, r"kv_head_map\[0\]: "),
]


def config(**fields):
    return LlamaConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=6, **fields
    )


@pytest.mark.parametrize(("maps", "message"), HOSTILE)
def test_what_is_no_map(maps, message):
    with pytest.raises((TypeError, ValueError), match=message):
        stored_maps(config(kv_head_map=maps))
    with pytest.raises((TypeError, ValueError)):
        stored_maps(config(kv_head_map=[[0] * 6] * 2, value_head_map=maps))
    with pytest.raises((TypeError, ValueError)):
        for layer in range(2):
            layer_maps(config(kv_head_map=maps), layer, 6, 6, 6)


def test_round_trip():
    keys, values = [HeadMap([0, 1, 0, 2, 2, 2])] * 2, [HeadMap([0, 0, 1, 1, 1, 1])] * 2
    one = config()
    store_maps(one, keys, values)
    assert stored_maps(one) == list(zip(keys, values, strict=True))
    assert stored_maps(config()) is None


def test_counts_that_do_not_divide_without_maps():
    message = "config.kv_head_map must say which of 4 KV heads each of 6 query heads reads"
    with pytest.raises(ValueError, match=message) as raised:
        layer_maps(config(), 0, 6, 4, 4)
    assert "gqa_kernels.convert.load" in str(raised.value)
