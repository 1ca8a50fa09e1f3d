"""Two processes of a cut model give what the whole model gives."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gqa_kernels.integrations.tensor_parallel import shard_model
from gqa_kernels.integrations.transformers import register
from tests.integrations.test_transformers import CLOSE, logits
from tests.tiny_models import batch, split, tiny

WORLD = 2
MODELS = {
    "uneven": lambda: split(tiny("llama"), num_kv_heads=4),
    "norms and biases": lambda: split(tiny("qwen3", attention_bias=True), num_kv_heads=4),
    "heads that do not divide": lambda: tiny("qwen2", num_heads=5, num_kv_heads=5),
    "feed-forward that does not divide": lambda: tiny("mistral", intermediate_size=63),
}


def _run(rank: int, rendezvous: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    register()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    inputs = batch([9, 5], "left")
    options = {"max_new_tokens": 6, "do_sample": False}
    for name, make in MODELS.items():
        whole, part = make(), shard_model(make(), rank, WORLD)
        torch.testing.assert_close(
            logits(part, inputs), logits(whole, inputs), **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
        theirs, ours = (model.generate(**inputs, **options) for model in (whole, part))
        assert torch.equal(ours, theirs), name
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_run, args=(f"file://{tmp_path}/rendezvous",), nprocs=WORLD)


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def test_every_rank_holds_its_part_only():
    whole = split(tiny(), num_kv_heads=4)
    parts = [shard_model(split(tiny(), num_kv_heads=4), rank, 3) for rank in range(3)]
    for name in ("q_proj", "o_proj"):
        sizes = [
            part.model.layers[0].self_attn.get_submodule(name).weight.numel() for part in parts
        ]
        assert sum(sizes) == whole.model.layers[0].self_attn.get_submodule(name).weight.numel()
    for part in parts:
        for index, layer in enumerate(part.model.layers):
            local_map = part.config.kv_head_map[index]
            assert layer.self_attn.q_proj.out_features == 16 * len(local_map)
            assert layer.self_attn.k_proj.out_features == 16 * (max(local_map) + 1)
    feed_forward = [part.model.layers[0].mlp.down_proj.in_features for part in parts]
    assert feed_forward == [21, 21, 22]


class TestErrors:
    def test_model_without_a_plan(self):
        model = nn.Module()
        model.config = type("Config", (), {"model_type": "other"})()
        with pytest.raises(NotImplementedError, match="of a other model must name q_proj"):
            shard_model(model, 0, 2)

    def test_unknown_rule(self):
        model = tiny()
        model.config.base_model_tp_plan = {
            **model.config.base_model_tp_plan,
            "layers.*.mlp.down_proj": "other",
        }
        with pytest.raises(NotImplementedError, match=r"must be colwise, rowwise .*got 'other'"):
            shard_model(model, 0, 2)

    def test_training(self):
        model = shard_model(tiny(), 0, 1)
        model.model.embed_tokens.weight.requires_grad_(True)
        with pytest.raises(NotImplementedError, match=r"is for inference.*torch\.no_grad"):
            model(**batch([5], "left"))
