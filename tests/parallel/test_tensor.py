"""Two processes of a cut model give what the whole model gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gqa_kernels import HeadMap
from gqa_kernels.cli import main
from gqa_kernels.convert import convert, load, save
from gqa_kernels.integrations.transformers import register
from gqa_kernels.parallel.shard_checkpoint import load_shard, shard_checkpoint
from gqa_kernels.parallel.tensor import shard_model
from tests.integrations.test_transformers import CLOSE, logits
from tests.parallel.ranks import WORLD, run_ranks
from tests.tiny_models import batch, split, tiny

MODELS = {
    "uneven": lambda: split(tiny("llama"), num_kv_heads=4),
    "norms and biases": lambda: split(tiny("qwen3", attention_bias=True), num_kv_heads=4),
    "heads that do not divide": lambda: tiny("qwen2", num_heads=5, num_kv_heads=5),
    "feed-forward that does not divide": lambda: tiny("mistral", intermediate_size=63),
}


def apart() -> nn.Module:
    """K and V with heads of their own, as many as they like in each layer."""
    maps = [
        (HeadMap([0, 2, 0, 1, 0, 3]), HeadMap([1, 0, 1, 0, 0, 1])),
        (HeadMap([0, 0, 1, 1, 2, 2]), HeadMap([0, 1, 2, 0, 1, 2])),
    ]
    return convert(tiny(num_kv_heads=6), maps, merging="mean")


def check(whole, part, where, tokens=0):
    inputs = batch([9, 5], "left")
    torch.testing.assert_close(
        logits(part, inputs), logits(whole, inputs), **CLOSE, msg=lambda m: f"{where}: {m}"
    )
    if tokens:
        options = {"max_new_tokens": tokens, "do_sample": False}
        theirs, ours = (model.generate(**inputs, **options) for model in (whole, part))
        assert torch.equal(ours, theirs), where


def ranks(rank, folder):
    register()
    for name, make in MODELS.items():
        check(make(), shard_model(make(), rank, WORLD), name, tokens=6 if name == "uneven" else 0)
    for name in ("uneven", "apart"):
        part = load_shard(folder / f"{name}-shards", dtype=torch.float32)
        assert part.num_parameters() < load(folder / name).num_parameters()
        check(load(folder / name, dtype=torch.float32), part, f"{name} from shards", tokens=4)
    part = shard_model(MODELS["uneven"](), rank, WORLD)
    part.set_attn_implementation("sdpa")
    with pytest.raises(NotImplementedError, match="would compute equal groups"):
        logits(part, batch([5], "right"))
    with pytest.raises(ValueError, match=r"must be for rank . of 2, got rank . of 3"):
        load_shard(folder / "three")
    with pytest.raises(ValueError, match=r"folder must hold rank-.*shard\.json"):
        load_shard(folder / "uneven")


def test_two_processes_equal_one(tmp_path):
    register()
    for name, model in (("uneven", MODELS["norms and biases"]()), ("apart", apart())):
        save(model, tmp_path / name)
        shard_checkpoint(tmp_path / name, tmp_path / f"{name}-shards", WORLD)
    shard_checkpoint(tmp_path / "uneven", tmp_path / "three", 3)
    run_ranks(ranks, tmp_path, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in several files."""
    model = split(tiny("qwen3", attention_bias=True), num_kv_heads=4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


class TestShardCheckpoint:
    def test_holds_what_shard_model_keeps(self, folder, tmp_path, capsys):
        """From several files, by the command line; weights are bit for bit the model's."""
        out = tmp_path / "out"
        assert main(["shard", str(folder), str(out), "--ranks", "2"]) == 0
        assert capsys.readouterr().out == f"wrote {out}\n"
        for rank in range(2):
            own = out / f"rank-{rank}"
            assert (own / "tokenizer.json").read_text() == "{}"
            index = json.loads((own / "model.safetensors.index.json").read_text())
            found = {}
            for file in own.glob("*.safetensors"):
                tensors = load_file(file)
                assert all(index["weight_map"][name] == file.name for name in tensors)
                found |= tensors
            assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
            part = shard_model(load(folder), rank, 2)
            expected = dict(part.named_parameters())
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), name
            content = json.loads((own / "shard.json").read_text())
            assert (content["rank"], content["world"]) == (rank, 2)
            maps = [layer["head_map"] for layer in content["layers"].values()]
            assert maps == part.config.kv_head_map
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_nothing_is_left_of_a_failure(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"world must lie in \[1, 6\], got 7"):
            shard_checkpoint(folder, tmp_path / "out", 7)
        assert not list(tmp_path.iterdir())

    def test_copies_no_other_weights_and_no_code(self, folder, tmp_path):
        given = tmp_path / "given"
        shutil.copytree(folder, given)
        for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.gguf",
                     "model.onnx", "rust_model.ot", "old.ckpt", "a.pth", "modeling_x.py",
                     "pytorch_model.bin.index.json"):  # fmt: skip
            (given / name).write_text('{"weight_map": {}}')
        for name in ("tokenizer.json", "merges.txt", "spiece.model", "LICENSE", "chat.jinja"):
            (given / name).write_text("{}")
        shard_checkpoint(given, tmp_path / "out", 2)
        found = {file.name for file in (tmp_path / "out" / "rank-1").iterdir()}
        texts = {"tokenizer.json", "merges.txt", "spiece.model", "LICENSE", "chat.jinja"}
        own = {file.name for file in folder.iterdir()}
        assert found == own | texts | {"shard.json"}

    def test_stays_in_its_folder(self, folder, tmp_path):
        given, secret = tmp_path / "given", tmp_path / "secret"
        shutil.copytree(folder, given)
        secret.write_text("secret")
        (given / "tokenizer.json").unlink()
        (given / "tokenizer.json").symlink_to(secret)
        with pytest.raises(ValueError, match=r"got a link: tokenizer.json"):
            shard_checkpoint(given, tmp_path / "out", 2)
        (given / "tokenizer.json").unlink()
        next(given.glob("*.safetensors")).rename(tmp_path / "outside.safetensors")
        path = given / "model.safetensors.index.json"
        names = json.loads(path.read_text())["weight_map"]
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../outside.safetensors")}))
        with pytest.raises(ValueError, match="must name files in its own folder"):
            shard_checkpoint(given, tmp_path / "out", 2)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("world", [0, -1])
    def test_no_ranks(self, folder, tmp_path, world):
        with pytest.raises(ValueError, match=f"world must be at least 1 rank, got {world}"):
            shard_checkpoint(folder, tmp_path / "out", world)

    def test_errors(self, folder, tmp_path, capsys):
        with pytest.raises(ValueError, match="out must not exist or be empty"):
            shard_checkpoint(folder, folder, 2)
        with pytest.raises(ValueError, match=r"as safetensors, model\.safetensors not found"):
            shard_checkpoint(tmp_path, tmp_path / "out", 2)
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "model.safetensors").write_bytes(b"12345678")
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["shard", str(tmp_path), str(tmp_path / "out"), "--ranks", "2"]) == 2
        assert "must be a complete safetensors file" in capsys.readouterr().err
        config["quantization_config"] = {"quant_method": "fp8"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(NotImplementedError, match="must not be quantised"):
            shard_checkpoint(tmp_path, tmp_path / "out", 2)


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
