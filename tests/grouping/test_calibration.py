"""calibrate(): moments against sums over recorded activations; files; split halves."""

import pytest
import torch
from safetensors.torch import save_file

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.convert.sequential import convert_sequentially
from gqa_kernels.grouping.calibration import calibrate
from gqa_kernels.grouping.convergence import split_half
from gqa_kernels.grouping.moments import LayerStats, load_stats, save_stats
from gqa_kernels.models.families import attention_layers, layer_weights
from gqa_kernels.models.fingerprint import fingerprint
from tests import tiny_families
from tests.tiny_models import batch, tiny


def recorded(model, batches):
    """Inputs of each attention layer, and which tokens count: ``(x [B, S, d], mask [B, S])``."""
    seen = [[] for _ in model.model.layers]
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _, __, out, i=i: seen[i].append(out))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for inputs in batches:
            model(**inputs)
    for hook in hooks:
        hook.remove()
    masks = [inputs["attention_mask"].bool() for inputs in batches]
    return [list(zip(layer, masks, strict=True)) for layer in seen]


@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_leave_padding_out(side):
    model = tiny()
    batches = [batch([9, 4], side, seed=1), batch([6, 12, 1], side, seed=2)]
    stats = calibrate(model, batches)
    for layer, pieces in zip(stats, recorded(model, batches), strict=True):
        x = torch.cat([x[mask] for x, mask in pieces]).double()
        assert layer.count == len(x) == 32
        torch.testing.assert_close(layer.mean, x.mean(0))
        torch.testing.assert_close(layer.second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_position_means_leave_padding_out():
    model = tiny()
    inputs = batch([3, 5], "right")
    layer = calibrate(model, [inputs])[0]
    (x, _), *_ = recorded(model, [inputs])[0]
    assert layer.position_count.tolist() == [2, 2, 2, 1, 1]
    torch.testing.assert_close(layer.position_mean[:3], x[:, :3].double().mean(0))
    torch.testing.assert_close(layer.position_mean[3:], x[1, 3:].double())


def test_what_padding_holds_is_irrelevant():
    model = tiny()
    inputs = batch([3, 5], "right")
    other = {**inputs, "input_ids": inputs["input_ids"] + 7 * (1 - inputs["attention_mask"])}
    for a, b in zip(calibrate(model, [inputs]), calibrate(model, [other]), strict=True):
        torch.testing.assert_close(a.second_moment, b.second_moment)
        torch.testing.assert_close(a.position_mean, b.position_mean)


def test_plain_token_tensors_and_batching_make_no_difference():
    model = tiny()
    ids = batch([8, 8, 8], "left")["input_ids"]
    whole, pieces = calibrate(model, [ids]), calibrate(model, ids.split(1))
    for a, b in zip(whole, pieces, strict=True):
        assert a.count == b.count == 24
        torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.position_mean, b.position_mean)


def test_model_is_left_as_it_was():
    model = tiny().train()
    calibrate(model, [batch([4], "left")])
    assert model.training
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_hooks_go_when_a_batch_fails():
    model = tiny()

    def fails(*_):
        raise RuntimeError("no memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no memory"):
        calibrate(model, [batch([4], "left")])
    handle.remove()
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_not_a_number():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got NaN or inf in layer 1"):
        calibrate(model, [batch([4], "left")])


@pytest.mark.parametrize("batches", [[], [batch([0, 0, 2], "left")]], ids=["none", "padding"])
def test_nothing_to_calibrate_on(batches):
    batches = [{**inputs, "attention_mask": inputs["attention_mask"] * 0} for inputs in batches]
    with pytest.raises(ValueError, match="at least one token"):
        calibrate(tiny(), batches)


def same(a: LayerStats, b: LayerStats) -> bool:
    names = ("mean", "second_moment", "position_count", "position_mean")
    nested = [(a.query, b.query), *zip(a.halves or (), b.halves or (), strict=True)]
    return (
        a.count == b.count
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
        and all(x is y is None or same(x, y) for x, y in nested)
    )


def test_images():
    model = tiny_families.tiny("vit")
    images = tiny_families.inputs("vit")["pixel_values"]
    seen = []
    model.layers[1].layernorm_before.register_forward_hook(lambda *a: seen.append(a[-1]))
    layer = calibrate(model, [images])[1]
    x = seen[0].flatten(0, 1).double()
    assert layer.count == len(x) == 2 * 17  # 16 patches and the class token
    torch.testing.assert_close(layer.second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_encoder_decoder_masks_and_cross_attention():
    """Cross-attention: moments of what K and V read (the encoder's tokens), and of q's input."""
    model = tiny_families.tiny("t5")
    given = tiny_families.inputs("t5")
    given["decoder_attention_mask"] = torch.ones_like(given["decoder_input_ids"])
    given["decoder_attention_mask"][1, 5:] = 0
    stats = calibrate(model, [given])
    with torch.no_grad():
        encoded = model.encoder(given["input_ids"], given["attention_mask"]).last_hidden_state
    x = encoded[given["attention_mask"].bool()].double()
    assert [each.count for each in stats] == [14, 14, 12, 12, 14, 14]
    assert [each.query and each.query.count for each in stats] == [None] * 4 + [12, 12]
    torch.testing.assert_close(stats[4].second_moment, x.T @ x / 14, rtol=1e-5, atol=1e-6)


class TestFiles:
    def batches(self):
        return [batch([9, 4], "right", seed=seed) for seed in range(5)]

    def test_round_trip(self, tmp_path):
        given = {**tiny_families.inputs("t5")}
        for model, batches, halves in (
            (tiny(), self.batches(), True),
            (tiny_families.tiny("t5"), [given], False),
        ):
            stats = calibrate(model, batches, halves=halves)
            loaded = load_stats(save_stats(stats, tmp_path / "stats.safetensors"))
            assert all(same(a, b) for a, b in zip(loaded, stats, strict=True))

    @pytest.mark.parametrize("halves", [False, True])
    def test_resumed_run_gives_the_same(self, tmp_path, halves):
        model, path = tiny(), tmp_path / "sums.safetensors"
        whole = calibrate(model, self.batches(), halves=halves)

        class Died(Exception):
            pass

        def dying():
            yield from self.batches()[:3]
            raise Died

        with pytest.raises(Died):
            calibrate(model, dying(), halves=halves, resume=path, save_seconds=0)
        run = []
        model.model.embed_tokens.register_forward_hook(lambda *_: run.append(1))
        resumed = calibrate(model, self.batches(), halves=halves, resume=path)
        assert len(run) == 2  # three of five were kept
        assert all(same(a, b) for a, b in zip(resumed, whole, strict=True))
        assert [each.name for each in tmp_path.iterdir()] == ["sums.safetensors"]

    def test_sums_of_something_else(self, tmp_path):
        path, batches = tmp_path / "sums.safetensors", self.batches()
        calibrate(tiny(), batches[:4], resume=path)
        kept = path.read_bytes()
        another = tiny()
        with torch.no_grad():
            another.model.embed_tokens.weight[3] += 1
        for model, given, options, changed in (
            (tiny(num_hidden_layers=3), batches, {}, "model config, weights"),
            (another, batches, {}, "weights"),
            (tiny(), batches[1:], {}, "data"),
            (tiny(), batches[:3], {}, "data"),
            (tiny(), batches, {"halves": True}, r"halves \(was false, is true\)"),
        ):
            with pytest.raises(ValueError, match=f"other parts than this run: {changed}. Give"):
                calibrate(model, given, resume=path, **options)
        assert path.read_bytes() == kept
        found = calibrate(tiny(), batches, resume=path)  # more data continues
        assert all(same(a, b) for a, b in zip(found, calibrate(tiny(), batches), strict=True))

    def test_moments_of_something_else(self, tmp_path):
        model, batches = tiny(), self.batches()
        stats = calibrate(model, batches)
        path = save_stats(stats, tmp_path / "moments", fingerprint(model, batches))
        load_stats(path, fingerprint(model))
        with pytest.raises(ValueError, match="other parts than this run: data"):
            load_stats(path, fingerprint(model, batches[1:]))
        with pytest.raises(ValueError, match="other parts than this run: model config"):
            load_stats(path, fingerprint(tiny(num_kv_heads=3)))
        with pytest.raises(ValueError, match="must say what it was made from"):
            load_stats(save_stats(stats, path), fingerprint(model))

    def test_equal_moments_are_equal_files(self, tmp_path):
        stats, made_from = calibrate(tiny(), self.batches()), fingerprint(tiny(), self.batches())
        files = [save_stats(stats, tmp_path / name, made_from).read_bytes() for name in "ab"]
        assert files[0] == files[1]

    @pytest.mark.parametrize("kept", [0.9, 0.0])
    def test_truncated_file(self, tmp_path, kept):
        path = save_stats(calibrate(tiny(), self.batches()), tmp_path / "stats.safetensors")
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            load_stats(path)

    def test_file_of_another_kind(self, tmp_path):
        path = tmp_path / "sums.safetensors"
        calibrate(tiny(), self.batches(), resume=path)
        with pytest.raises(ValueError, match="must hold 'gqa-kernels moments 2', got"):
            load_stats(path)

    @pytest.mark.parametrize(
        "metadata",
        ["", "3", "[]", "{}", '{"format": "gqa-kernels moments 2"}', "[" * 100_000,
         '{"format": "gqa-kernels moments 2", "made from": null, "layers": 2}',
         '{"format": "gqa-kernels moments 2", "made from": null, "layers": "x"}'],
    )  # fmt: skip
    def test_hostile_metadata(self, tmp_path, metadata):
        path = tmp_path / "moments.safetensors"
        save_file({"0/mean": torch.ones(3)}, path, {"gqa-kernels": metadata})
        with pytest.raises(ValueError):
            load_stats(path)

    def test_nothing_is_written_of_a_run_with_nan(self, tmp_path):
        model = tiny()
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[0] = torch.nan
        with pytest.raises(ValueError, match="in layer 0"):
            calibrate(model, self.batches(), resume=tmp_path / "sums", save_seconds=0)
        assert not list(tmp_path.iterdir())


class TestHalves:
    def test_are_the_even_and_the_odd_batches(self):
        model, batches = tiny(), TestFiles().batches()
        stats = calibrate(model, batches, halves=True)
        for half in (0, 1):
            alone = calibrate(model, batches[half::2])
            assert all(same(a.halves[half], b) for a, b in zip(stats, alone, strict=True))
        whole = calibrate(model, batches)
        for a, b in zip(stats, whole, strict=True):
            torch.testing.assert_close(a.second_moment, b.second_moment)

    def test_equal_halves_agree(self):
        model, each = tiny(num_kv_heads=6), batch([12, 9], "right")
        for layer in split_half(model, calibrate(model, [each, each], halves=True), 3):
            assert layer.difference == 0
            assert layer.same
            assert layer.excess == (0, 0)

    def test_more_data_brings_halves_together(self):
        model = tiny(num_kv_heads=6)

        def difference(texts):
            batches = [batch([16] * texts, "right", seed=seed) for seed in (1, 2)]
            found = split_half(model, calibrate(model, batches, halves=True), 3)
            assert all(min(layer.excess) >= 0 for layer in found)
            return found[1].difference

        assert difference(64) < difference(2) / 2

    def test_none(self):
        model = tiny(num_kv_heads=6)
        with pytest.raises(ValueError, match="halves=True"):
            split_half(model, calibrate(model, [batch([8], "right")]), 2)


class TestSequential:
    MAPS = (HeadMap([0, 0, 1, 0, 1, 2]), HeadMap([0, 1, 1, 0, 1, 0]))

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bert", "vit"])
    def test_same_model_and_the_childs_own_moments(self, family):
        """With maps that don't depend on moments it is ``convert``; its moments are the child's."""
        model = tiny_families.tiny(family)
        batches = [tiny_families.inputs(family)] * 2
        child, stats = convert_sequentially(model, batches, lambda *_: self.MAPS)
        at_once = convert(model, [self.MAPS] * 2)
        for name, tensor in child.state_dict().items():
            assert torch.equal(tensor, at_once.state_dict()[name])
        assert child.config.kv_head_map == at_once.config.kv_head_map
        of_child, of_parent = calibrate(child, batches), calibrate(model, batches)
        for a, b in zip(stats, of_child, strict=True):
            torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(stats[1].second_moment, of_parent[1].second_moment, rtol=1e-2)

    def test_choice_sees_each_layer(self):
        model = tiny_families.tiny("llama")
        seen = []

        def choose(layer, stats):
            seen.append((layer.index, layer_weights(layer).k.shape[0], stats.count))
            return self.MAPS

        child, _ = convert_sequentially(model, [tiny_families.inputs("llama")], choose)
        assert seen == [(0, 6, 14), (1, 6, 14)]
        assert [layer.heads for layer in attention_layers(child)] == [(6, 3, 2)] * 2

    def test_encoder_decoder(self):
        with pytest.raises(NotImplementedError, match="t5 model can't be calibrated in sequence"):
            convert_sequentially(tiny_families.tiny("t5"), [], lambda *_: self.MAPS)
