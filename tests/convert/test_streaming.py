"""convert_from_disk against convert of the same plan in memory; pages of mapped files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gqa_kernels.convert import convert, load
from gqa_kernels.convert.streaming import convert_from_disk
from gqa_kernels.grouping import calibrate
from gqa_kernels.models.mapped import release


def llama(heads=6):
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=48, n_layer=2, n_head=6)
    )


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("request_", [{"num_kv_heads": 2}, {"budget": 16}])
def test_same_as_in_memory(make, request_, tmp_path):
    torch.manual_seed(0)
    parent = make().eval()
    texts = torch.randint(64, (6, 2, 24))
    parent.save_pretrained(tmp_path / "parent", max_shard_size="60KB")
    found = convert_from_disk(
        tmp_path / "parent", tmp_path / "child", texts[:4], texts[4:], work=tmp_path / "work",
        **request_,
    )  # fmt: skip
    child = load(tmp_path / "child")
    stats = calibrate(parent, texts[:4])
    expected = convert(parent, found.maps, found.merging, moments=stats)
    expected.set_attn_implementation("asym_gqa")
    ids = torch.randint(64, (2, 16))
    with torch.no_grad():
        ours, theirs = child(ids).logits, expected(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    heads = sum(m.num_kv_heads for pair in found.maps for m in pair)
    assert heads == request_.get("budget", 2 * 2 * len(found.maps))
    assert child.config.kv_head_map == [list(k) for k, _ in found.maps]
    if "num_kv_heads" in request_:
        from gqa_kernels.grouping import layer_errors

        errors = layer_errors(parent, child, texts[4:])
        assert [layer.error for layer in found.layers] == pytest.approx(errors, rel=0.02)


def resident(tensor):
    """kB of a tensor's mapping that are in memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and head == "Rss:":
            return int(line.split()[1])
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_release(tmp_path):
    save_file({"x": torch.arange(1 << 20, dtype=torch.float32)}, tmp_path / "x.safetensors")
    x = load_file(tmp_path / "x.safetensors")["x"]
    total = float(x.double().sum())
    assert resident(x) >= 4000
    assert release([x]) >= x.numel() * 4
    assert resident(x) <= 200
    assert float(x.double().sum()) == total


def test_release_keeps_what_was_written(tmp_path):
    save_file({"x": torch.zeros(1 << 16)}, tmp_path / "x.safetensors")
    x = load_file(tmp_path / "x.safetensors")["x"]
    x += 1
    y = torch.ones(1 << 16)
    assert release([x, y]) == 0
    assert float(x.sum()) == float(y.sum()) == 1 << 16
