"""search, convert, eval and inspect: artefacts on a tiny model, and refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_kernels import cli
from gqa_kernels.cli import data
from gqa_kernels.convert import load, recovery, save
from gqa_kernels.convert.plan import Plan
from gqa_kernels.grouping import calibrate, calibration
from gqa_kernels.grouping.moments import save_stats
from gqa_kernels.models.families import attention_layers
from gqa_kernels.models.fingerprint import fingerprint
from gqa_kernels.train_demo import training
from tests import tiny_families
from tests.samples.stand_ins import ByteTokenizer
from tests.tiny_models import tiny

SHAPE = ("--shape", "6", "24")
MODULES = {"eval": "evaluate"}  # commands that their module isn't named after


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent, what search wrote, and a converted child."""
    root = tmp_path_factory.mktemp("commands")
    save(tiny(num_heads=6, num_kv_heads=6, vocab_size=128), root / "parent")
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: SavedTokenizer())
    search = ("search", root / "parent", "--kv-heads", 3, "--sizes", "auto", "--check")
    assert main(*search, "--out", root / "search", *SHAPE) == 0
    convert = ("convert", root / "parent", root / "search", root / "child", "--steps", 2)
    assert main(*convert, *SHAPE) == 0
    assert names(root) == {"parent", "search", "child"}  # the recovery's state is gone
    yield root
    patch.undo()


class SavedTokenizer(ByteTokenizer):
    def save_pretrained(self, folder):
        (folder / "tokenizer.txt").write_text("bytes")


def main(*arguments):
    return cli.main(list(map(str, arguments)))


def flat(options):
    """Options by name as arguments."""
    return [x for name, values in options.items() for x in (name, *values)]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_search(folders):
    found = Plan.load(folders / "search" / "plan.json")
    assert [m.num_kv_heads for pair in found.maps for m in pair] == [3] * 4
    assert all(layer.error > 0 for layer in found.layers)
    expected = {"plan.json", "moments.safetensors", "maps.png", "curves.png", "heads.png"}
    assert names(folders / "search") == expected


def test_convert(folders):
    plan = Plan.load(folders / "search" / "plan.json")
    child = load(folders / "child")
    maps = [(layer.key_map, layer.value_map) for layer in attention_layers(child)]
    assert maps == plan.maps
    history = json.loads((folders / "child" / "recovery.json").read_text())
    assert len(history["loss"]) == 2
    assert [steps for steps, _ in history["validation"]] == [0, 2]
    assert {"maps.png", "recovery.png", "tokenizer.txt"} <= names(folders / "child")


def test_validation_texts_are_not_trained_on(folders, tmp_path, capsys):
    convert = ("convert", folders / "parent", folders / "search", tmp_path / "child")
    assert main(*convert, "--steps", 1, "--validate", 6, *SHAPE) == 2
    assert "--validate must leave a batch to train on, got 6" in capsys.readouterr().err
    assert main(*convert, "--steps", 1, "--validate", 5, *SHAPE) == 0
    line = capsys.readouterr().out
    history = json.loads((tmp_path / "child" / "recovery.json").read_text())["validation"]
    assert f"distance to the parent: {history[0][1]:.4g} before, {history[1][1]:.4g} after" in line


@pytest.mark.parametrize(
    ("budget", "heads"), [("50%", 12), ("9", 9), ("512B", 8), ("0.5KiB", 8)]
)  # fmt: skip
def test_budgets(folders, tmp_path, capsys, budget, heads):
    """Of 24 heads of 16 fp32 numbers: 64 bytes each."""
    search = ("search", folders / "parent", "--budget", budget, "--out", tmp_path, *SHAPE)
    assert main(*search, "--weights", "none") == 0
    maps = Plan.load(tmp_path / "plan.json").maps
    assert sum(head_map.num_kv_heads for pair in maps for head_map in pair) == heads
    assert "minimised: held-out error of each layer's attention output" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["many", "-4", "1.5", "3GB", "2"])
def test_budgets_that_are_none(folders, tmp_path, capsys, budget):
    search = ("search", folders / "parent", f"--budget={budget}", "--out", tmp_path, *SHAPE)
    assert main(*search) == 2
    assert "budget must be" in capsys.readouterr().err


def test_eval(folders, tmp_path, capsys):
    out = tmp_path / "eval"
    assert main("eval", folders / "parent", folders / "child", "--out", out, *SHAPE) == 0
    found = json.loads((out / "eval.json").read_text())
    assert found["tokens"] == 6 * 23
    assert f"perplexity {found['perplexity']:.6g}" in capsys.readouterr().out
    assert names(out) == {"eval.json", "errors.png", "entropy.png"}


def test_inspect(folders, tmp_path, capsys):
    assert main("inspect", folders / "child", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    maps = Plan.load(folders / "search" / "plan.json").maps
    for index, (key, value) in enumerate(maps):
        line = f"layer {index}: 6 query heads; K 3 heads {list(key)}, V 3 heads {list(value)}"
        assert line in text
    assert "KV cache: 768 bytes per token, 50.0% of a head per query head" in text
    saved = json.loads((tmp_path / "maps.json").read_text())
    assert saved == [{"k": list(k), "v": list(v)} for k, v in maps]


def test_images_by_batches(tmp_path):
    save(tiny_families.tiny("vit"), tmp_path / "vit")
    save_file(tiny_families.inputs("vit"), tmp_path / "images.safetensors")
    options = ("--batches", tmp_path / "images.safetensors")
    search = ("search", tmp_path / "vit", "--budget", 10, "--out", tmp_path / "search", *options)
    assert main(*search) == 0
    assert main("convert", tmp_path / "vit", tmp_path / "search", tmp_path / "child") == 0
    heads = [layer.heads for layer in attention_layers(load(tmp_path / "child"))]
    assert sum(each.key + each.value for each in heads) <= 10
    evaluate = ("eval", tmp_path / "vit", tmp_path / "child", "--out", tmp_path / "eval", *options)
    assert main(*evaluate) == 0
    assert 0 < json.loads((tmp_path / "eval" / "eval.json").read_text())["state_cosine"] < 1


def test_without_matplotlib_results_stay(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.reporting.plots._figure", missing)
    assert main("inspect", folders / "child", "--out", tmp_path) == 0
    assert names(tmp_path) == {"maps.json"}
    assert "no picture: pictures need matplotlib" in capsys.readouterr().err


def test_types_of_the_parent(folders, tmp_path):
    save(load(folders / "parent").bfloat16(), tmp_path / "parent")
    save_file({"input_ids": torch.randint(3, 64, (4, 16))}, tmp_path / "ids.safetensors")
    options = ("--batches", tmp_path / "ids.safetensors")
    search = ("search", tmp_path / "parent", "--kv-heads", 2, "--method", "key_norm")
    assert main(*search, "--out", tmp_path / "search", *options) == 0
    convert = ("convert", tmp_path / "parent", tmp_path / "search", tmp_path / "child")
    assert main(*convert, "--steps", 2, *options) == 0
    child = load(tmp_path / "child", dtype="auto")
    assert {p.dtype for p in child.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "child" / "config.json").read_text())["dtype"] == "bfloat16"


def test_cache_bytes_are_those_of_the_checkpoints_type(folders, tmp_path, capsys):
    save(load(folders / "child").bfloat16(), tmp_path / "child")
    assert main("inspect", tmp_path / "child") == 0
    assert "KV cache: 384 bytes per token" in capsys.readouterr().out


class TestInterrupted:
    """Ctrl-C: one line that says what is kept, exit status 130, and the same command continues."""

    def interrupted(self, capsys, *arguments):
        assert main(*arguments) == 130
        errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("gqa-kernels:")]
        assert len(errors) == 1
        return errors[0]

    def stop(self, monkeypatch, module, name, calls):
        """Let a function of a module raise KeyboardInterrupt after some calls."""
        inner, seen = getattr(module, name), []

        def stopping(*arguments, **options):
            if len(seen) == calls:
                raise KeyboardInterrupt
            seen.append(1)
            return inner(*arguments, **options)

        monkeypatch.setattr(module, name, stopping)

    def test_search(self, folders, tmp_path, capsys, monkeypatch):
        search = ("search", folders / "parent", "--kv-heads", 2, "--out", tmp_path / "s", *SHAPE)
        with monkeypatch.context() as patch:
            self.stop(patch, calibration, "model_inputs", 0)
            line = self.interrupted(capsys, *search)
        assert line == "gqa-kernels: interrupted; nothing was kept"
        with monkeypatch.context() as patch:
            self.stop(patch, calibration, "model_inputs", 3)
            line = self.interrupted(capsys, *search)
        assert f"1 batches are kept in {tmp_path / 's' / 'sums.safetensors'}" in line
        assert main(*search) == 0

    def test_convert(self, folders, tmp_path, capsys, monkeypatch):
        """As the README's example: without --state."""
        convert = ("convert", folders / "parent", folders / "search", tmp_path / "c", "--steps", 3)
        with monkeypatch.context() as patch:
            self.stop(patch, recovery, "_step", 2)
            line = self.interrupted(capsys, *convert, *SHAPE)
        assert f"1 of 3 steps of recovery are kept in {tmp_path / 'c.recovery'}" in line
        assert names(tmp_path) == {"c.recovery"}
        assert main(*convert, *SHAPE) == 0
        assert names(tmp_path) == {"c"}
        whole = ("convert", folders / "parent", folders / "search", tmp_path / "d", "--steps", 3)
        assert main(*whole, "--state", tmp_path / "kept", *SHAPE) == 0
        assert names(tmp_path) == {"c", "d", "kept"}
        a, b = (load_file(tmp_path / name / "model.safetensors") for name in "cd")
        assert all(torch.equal(a[name], b[name]) for name in b)

    def test_a_state_that_is_broken(self, folders, tmp_path, capsys, monkeypatch):
        def writes_and_stops(*_):
            (tmp_path / "c.recovery").mkdir()
            (tmp_path / "c.recovery" / "recovery.pt").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(recovery, "_step", writes_and_stops)
        convert = ("convert", folders / "parent", folders / "search", tmp_path / "c", "--steps", 3)
        line = self.interrupted(capsys, *convert, *SHAPE)
        assert line == "gqa-kernels: interrupted; nothing was kept"

    def test_train_demo(self, tmp_path, capsys, monkeypatch):
        pytest.importorskip("sklearn")
        self.stop(monkeypatch, training, "loss", 3)
        train = ("train-demo", "--quick", "--task", "digits", "--seeds", 1, "--folder", tmp_path)
        assert f"1 checkpoints are kept in {tmp_path}" in self.interrupted(capsys, *train)


def missing(*_):
    raise ImportError("pictures need matplotlib: pip install 'gqa-kernels[plots]'")


class TestRefusals:
    def refused(self, capsys, *arguments):
        assert main(*arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after transformers' bars
        assert error.startswith("gqa-kernels: ")
        return error

    def test_model_that_is_not_there(self, tmp_path, capsys):
        error = self.refused(capsys, "inspect", tmp_path / "nowhere")
        assert "must be a checkpoint" in error

    @pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:99"])
    def test_devices_that_are_not_there(self, folders, tmp_path, capsys, device):
        for command in ("search", "eval", "convert"):
            places = [folders / "parent"] * (1 if command == "search" else 2)
            places = places if command != "convert" else [places[0], folders / "search"]
            out = (tmp_path / "out",) if command == "convert" else ("--out", tmp_path / "out")
            error = self.refused(capsys, command, *places, *out, "--device", device)
            assert f"--device must be one that works here, got {device}" in error

    def test_truncated_checkpoint(self, folders, tmp_path, capsys):
        folder = save(load(folders / "child"), tmp_path / "child")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert "must be a complete checkpoint" in self.refused(capsys, "inspect", folder)

    def test_more_groups_than_heads(self, folders, tmp_path, capsys):
        search = ("search", folders / "parent", "--kv-heads", 7, "--out", tmp_path, *SHAPE)
        assert "7" in self.refused(capsys, *search)
        assert "plan.json" not in names(tmp_path)

    def test_activations_with_nan(self, folders, tmp_path, capsys):
        model = load(folders / "parent")
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(torch.nan)
        save(model, tmp_path / "broken")
        search = ("search", tmp_path / "broken", "--kv-heads", 2, "--out", tmp_path / "s", *SHAPE)
        assert "activations must be finite" in self.refused(capsys, *search)
        assert not (tmp_path / "s").exists()

    def test_plan_of_another_model(self, folders, tmp_path, capsys):
        save(tiny(num_hidden_layers=3), tmp_path / "other")
        convert = ("convert", tmp_path / "other", folders / "search", tmp_path / "out")
        assert "other parts than this run: model config, weights. Give" in self.refused(
            capsys, *convert
        )
        assert not (tmp_path / "out").exists()

    def test_folder_that_is_taken(self, folders, capsys, monkeypatch):
        """Refused before the model is loaded, not after it was trained."""
        monkeypatch.setattr("gqa_kernels.cli.convert.load_model", None)
        convert = ("convert", folders / "parent", folders / "search", folders / "child")
        assert "must not exist or be empty" in self.refused(capsys, *convert)

    @pytest.mark.parametrize("command", ["search", "convert", "eval", "inspect", "shard"])
    def test_folder_that_cannot_be(self, folders, tmp_path, capsys, monkeypatch, command):
        monkeypatch.setattr(f"gqa_kernels.cli.{MODULES.get(command, command)}.load_model", None,
                            raising=False)  # fmt: skip
        (tmp_path / "file").touch()
        parent, out = folders / "parent", tmp_path / "file" / "out"
        arguments = {
            "search": (parent, "--kv-heads", 2, "--out", out),
            "convert": (parent, folders / "search", out),
            "eval": (parent, folders / "child", "--out", out),
            "inspect": (parent, "--out", out),
            "shard": (parent, out, "--ranks", 2),
        }[command]
        assert "must lie in a folder" in self.refused(capsys, command, *arguments)

    def another(self, folders, tmp_path):
        """A model of the same shapes with other weights."""
        model = load(folders / "parent")
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.neg_()
        return save(model, tmp_path / "another")

    def test_sums_of_another_model(self, folders, tmp_path, capsys, monkeypatch):
        out = ("--kv-heads", 2, "--out", tmp_path / "s")
        with monkeypatch.context() as patch:
            patch.setattr("gqa_kernels.convert.plan.plan", missing)
            self.refused(capsys, "search", folders / "parent", *out, *SHAPE)
        assert names(tmp_path / "s") == {"sums.safetensors", "moments.safetensors"}
        other = self.another(folders, tmp_path)
        error = self.refused(capsys, "search", other, *out, *SHAPE)
        assert "sums.safetensors was made from other parts than this run: weights. Give" in error
        error = self.refused(capsys, "search", folders / "parent", *out, "--shape", 6, 25)
        assert "other parts than this run: data. Give" in error
        assert main("search", folders / "parent", *out, *SHAPE) == 0

    def test_plan_of_another_models_weights(self, folders, tmp_path, capsys):
        other = self.another(folders, tmp_path)
        convert = ("convert", other, folders / "search", tmp_path / "out")
        error = self.refused(capsys, *convert)
        assert "plan.json was made from other parts than this run: weights. Give" in error
        assert not (tmp_path / "out").exists()

    def test_plan_and_moments_that_do_not_belong_together(self, folders, tmp_path, capsys):
        shutil.copytree(folders / "search", tmp_path / "mixed")
        moments = tmp_path / "mixed" / "moments.safetensors"
        model = load(folders / "parent")
        data = [torch.arange(3, 27)[None]]
        save_stats(calibrate(model, data), moments, fingerprint(model, data))
        convert = ("convert", folders / "parent", tmp_path / "mixed", tmp_path / "out")
        assert "moments.safetensors was made from other parts than this run: data" in self.refused(
            capsys, *convert
        )

    @pytest.mark.parametrize("change", [
        ("--steps", 4), ("--train", "all"), ("--learning-rate", 1), ("--shape", 5, 24),
        ("--merging", "mean"), ("--dtype", "bfloat16"), ("--checkpointing",),
    ])  # fmt: skip
    def test_state_of_something_else(self, folders, tmp_path, capsys, change):
        state = tmp_path / "state"
        convert = ("convert", folders / "parent", folders / "search", tmp_path / "c", "--state",
                   state)  # fmt: skip
        options = {"--steps": (1,), "--shape": SHAPE[1:]}
        assert main(*convert, *flat(options)) == 0
        shutil.rmtree(tmp_path / "c")
        options[change[0]] = change[1:]
        assert "other parts than this run: " in self.refused(capsys, *convert, *flat(options))

    @pytest.mark.parametrize(
        ("text", "message"),
        [("[1]", "must hold 'gqa-kernels plan 3'"), ("{", "must be a plan in JSON"),
         ('{"format": "gqa-kernels plan 3"}', "must be a complete plan"),
         ('{"format": "gqa-kernels plan 3", "layers": [3]}', "must be a complete plan"),
         ("[" * 100_000, "must be a plan in JSON")],
    )  # fmt: skip
    def test_hostile_plans(self, folders, tmp_path, capsys, text, message):
        (tmp_path / "plan.json").write_text(text)
        convert = ("convert", folders / "parent", tmp_path / "plan.json", tmp_path / "out")
        assert message in self.refused(capsys, *convert)

    @pytest.mark.parametrize("option", ["--merging", "--train"])
    def test_unknown_names_before_the_model_is_loaded(self, folders, tmp_path, capsys, option):
        convert = ("convert", tmp_path / "nowhere", folders / "search", tmp_path / "out")
        assert "got 'x'" in self.refused(capsys, *convert, option, "x", "--steps", 1)

    def test_tokens_out_of_the_vocabulary(self, folders, tmp_path, capsys):
        save_file({"input_ids": torch.full((2, 8), 128)}, tmp_path / "ids.safetensors")
        options = ("--batches", tmp_path / "ids.safetensors", "--out", tmp_path / "out")
        for command in (
            ("search", folders / "parent", "--kv-heads", 2),
            ("eval", folders / "parent", folders / "child"),
        ):
            error = self.refused(capsys, *command, *options)
            assert "input_ids must lie in [0, 128), the model's vocabulary, got 128" in error

    @pytest.mark.parametrize("option", ["--ranks=0", "--ranks=-1", "--ranks=x", "--ranks=7"])
    def test_numbers_of_ranks(self, folders, tmp_path, capsys, option):
        try:
            status = main("shard", folders / "parent", tmp_path / "out", option)
        except SystemExit as stopped:  # argparse's
            status = stopped.code
        assert status == 2 and not names(tmp_path)
        assert option.split("=")[1] in capsys.readouterr().err.splitlines()[-1]

    def test_text_that_is_not_utf8(self, folders, tmp_path, capsys):
        (tmp_path / "text").write_bytes(b"\xff\xfe\xfd")
        search = ("search", folders / "parent", "--kv-heads", 2, "--out", tmp_path / "s")
        assert "--text must be a UTF-8 file" in self.refused(
            capsys, *search, "--text", tmp_path / "text"
        )

    def test_unknown_family(self, tmp_path, capsys):
        save(tiny("cohere"), tmp_path / "cohere")
        error = self.refused(capsys, "inspect", tmp_path / "cohere")
        assert "must be one of llama, " in error and "got 'cohere'" in error

    def test_model_without_a_tokenizer(self, folders, tmp_path, capsys, monkeypatch):
        loaded = lambda name, device: data.Loaded(load(name), None, {})  # noqa: E731
        monkeypatch.setattr(data, "load_model", loaded)
        monkeypatch.setattr("gqa_kernels.cli.search.load_model", data.load_model)
        search = ("search", folders / "parent", "--kv-heads", 2, "--out", tmp_path, *SHAPE)
        assert "--batches must be given" in self.refused(capsys, *search)

    def test_rows_that_differ(self, folders, tmp_path, capsys):
        path = tmp_path / "batches.safetensors"
        save_file({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(3, 4)}, path)
        search = ("search", folders / "parent", "--kv-heads", 2, "--out", tmp_path)
        assert "equally many rows, got [2, 3]" in self.refused(capsys, *search, "--batches", path)
