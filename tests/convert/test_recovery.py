"""recover(): it learns, resumes bit for bit, trains chosen weights only, refuses nonsense."""

import copy
import sys

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.convert.evaluation import evaluate, perplexity
from gqa_kernels.convert.recovery import Recipe, recover, steps_kept
from gqa_kernels.integrations.transformers import register
from gqa_kernels.models.families import attention_layers
from tests import tiny_families
from tests.tiny_models import batch, tiny

MAPS = [(HeadMap([0, 0, 1, 0, 1, 2]), HeadMap([0, 1, 1, 0, 1, 0]))] * 2


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def child_of(parent):
    child = convert(parent, MAPS)
    child.set_attn_implementation("asym_gqa")
    return child


def texts():
    """Rows that one model wrote, so that there is something to learn."""
    ids = torch.randint(3, 64, (8, 4), generator=torch.Generator().manual_seed(0))
    return list(ids.repeat(1, 3).split(2))


def recipe(**changes):
    return Recipe(**{"steps": 6, "learning_rate": 3e-3, "warmup": 2, **changes})


def changed(before, after):
    return {n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}


@pytest.mark.parametrize("trained", ["all", "attention", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_learns_and_trains_what_it_is_told_to(family, trained):
    if trained == "lora":
        pytest.importorskip("peft")
    model = child_of(tiny_families.tiny(family))
    before, names = copy.deepcopy(model), list(model.state_dict())
    seen = recover(
        model, texts(), recipe(steps=12, trained=trained), validate=lambda m: perplexity(m, texts())
    )
    assert list(model.state_dict()) == names  # adapters are gone
    assert len(seen.loss) == 12
    assert [step for step, _ in seen.validation] == [0, 12]
    assert seen.validation[1][1] < 0.9 * seen.validation[0][1]
    assert perplexity(model, texts()) == pytest.approx(seen.validation[1][1], rel=1e-4)
    moved = changed(before, model)
    others = [name for name in moved if "attn" not in name]
    assert moved
    assert bool(others) == (trained == "all")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peft_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"trained='lora' needs peft >= 0\.21 \(pip install"):
        recover(child_of(tiny()), texts(), recipe(trained="lora"))


def test_resumed_run_gives_the_same(tmp_path):
    parent = tiny(num_kv_heads=6)
    whole, resumed = child_of(parent), child_of(parent)
    expected = recover(whole, texts(), recipe())

    class Died(Exception):
        pass

    calls = []

    def dies(model):
        calls.append(1)
        if len(calls) == 3:
            raise Died
        return 0.0

    options = {"folder": tmp_path, "save_seconds": 0, "validate": dies, "validate_every": 2}
    with pytest.raises(Died):
        recover(resumed, texts(), recipe(), **options)
    resumed = child_of(parent)  # a new process
    seen = recover(resumed, texts(), recipe(), **options)
    assert seen.loss == expected.loss
    assert not changed(whole, resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["recovery.pt"]


def test_the_first_step_is_kept(tmp_path):
    """Interrupted within the first minute, a run still continues after its first step."""
    whole, model = child_of(tiny(num_kv_heads=6)), child_of(tiny(num_kv_heads=6))
    expected = recover(whole, texts(), recipe(steps=3))

    def interrupted(_, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 4:  # before the first step, after the first, after the second
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        recover(
            model, texts(), recipe(steps=3), folder=tmp_path, validate=interrupted, validate_every=1
        )
    assert steps_kept(tmp_path) == 1
    model = child_of(tiny(num_kv_heads=6))
    assert recover(model, texts(), recipe(steps=3), folder=tmp_path).loss == expected.loss
    assert not changed(whole, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_trained_in_fp32(dtype):
    """Steps that 16-bit weights would round away add up, and the model keeps its types."""
    model = child_of(tiny(num_kv_heads=6)).to(dtype)
    before = copy.deepcopy(model)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    small = recipe(steps=40, learning_rate=1e-4)
    recover(model, texts(), small)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == types
    reference = copy.deepcopy(before).float()
    recover(reference, texts(), small)
    weight = "model.layers.0.self_attn.q_proj.weight"
    exact, start = reference.state_dict()[weight], before.state_dict()[weight].float()
    assert torch.equal(model.state_dict()[weight], exact.to(dtype))
    assert (exact - start).abs().max() > 0


def test_computes_in_bf16_with_fp32_masters():
    """Steps that bf16 weights would round away add up."""
    model = child_of(tiny(num_kv_heads=6))
    exact, before = copy.deepcopy(model), copy.deepcopy(model)
    full = recover(exact, texts(), recipe(steps=4, learning_rate=1e-5))
    seen = recover(model, texts(), recipe(steps=4, learning_rate=1e-5, dtype="bfloat16"))
    assert seen.loss == pytest.approx(full.loss, rel=0.02) and seen.loss != full.loss
    weight = "model.layers.0.self_attn.q_proj.weight"
    old, new = before.state_dict()[weight], model.state_dict()[weight]
    assert new.dtype == torch.float32
    moved = (new - old).abs()
    assert 0 < moved.max() < 1e-4 < old.abs().max() * 2**-8
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'int8'"):
        Recipe(dtype="int8")


@pytest.mark.parametrize("trained", ["attention", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_runs_blocks_twice_and_changes_nothing(family, trained):
    if trained == "lora":
        pytest.importorskip("peft")
    plain = child_of(tiny_families.tiny(family))
    model = copy.deepcopy(plain)
    runs = []
    attention_layers(model)[0].module.register_forward_pre_hook(lambda *_: runs.append(1))
    expected = recover(plain, texts(), recipe(steps=3, trained=trained)).loss
    found = recover(model, texts(), recipe(steps=3, trained=trained, checkpointing=True)).loss
    assert found == expected and len(runs) == 2 * 3
    assert not changed(plain, model)
    recover(model, texts(), recipe(steps=1, trained=trained))
    assert len(runs) == 2 * 3 + 1


def test_distillation_pulls_towards_the_parent():
    parent = tiny(num_kv_heads=6)
    found = {}
    for weight in (0.0, 1.0):
        child = child_of(parent)
        recover(child, texts(), recipe(steps=12, distillation=weight), parent=parent)
        found[weight] = evaluate(parent, child, texts()).kl
    start = evaluate(parent, child_of(parent), texts()).kl
    assert found[1.0] < 0.7 * start
    assert found[1.0] < found[0.0]


def test_labels_of_other_tasks():
    t5 = tiny_families.tiny("t5")
    model = convert(t5, MAPS * 3)
    model.set_attn_implementation("asym_gqa")
    given = tiny_families.inputs("t5")
    given["labels"] = given.pop("decoder_input_ids")
    seen = recover(model, [given], recipe(steps=8))
    assert seen.loss[-1] < seen.loss[0]


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_encoders_learn_the_parents_states(family):
    parent, given = tiny_families.tiny(family), tiny_families.inputs(family)
    child = child_of(parent)
    before = evaluate(parent, child, [given]).state_cosine
    seen = recover(child, [given], recipe(steps=12, distillation=1.0), parent=parent)
    assert seen.loss[-1] < seen.loss[0] / 2
    assert evaluate(parent, child, [given]).state_cosine > before
    with pytest.raises(NotImplementedError, match=f"must hold labels for a {family} model"):
        recover(child, [given], recipe())


def test_steps_accumulate_batches():
    """Two batches of one step are one batch of both: rows of equal length weigh alike."""
    parent = tiny(num_kv_heads=6)
    models = [child_of(parent) for _ in range(2)]
    pieces = [batch([8, 8], "right", seed=seed)["input_ids"] for seed in (1, 2)]
    recover(models[0], pieces, recipe(steps=1, accumulate=2))
    recover(models[1], [torch.cat(pieces)], recipe(steps=1))
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(tensor, models[1].state_dict()[name], rtol=1e-3, atol=1e-3)


def test_learning_rate():
    plan = Recipe(steps=110, learning_rate=1.0, warmup=10)
    assert [plan.rate(step) for step in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.55])
    assert plan.rate(109) == pytest.approx(0.1, abs=1e-3)


class TestErrors:
    def test_no_batches(self):
        with pytest.raises(ValueError, match="at least one batch"):
            recover(tiny(), [], recipe())

    def test_no_parent(self):
        with pytest.raises(ValueError, match="parent must be given"):
            recover(tiny(), texts(), recipe(distillation=0.5))

    def test_loss_that_is_not_finite(self):
        model = tiny()
        with torch.no_grad():
            model.lm_head.weight[0] = torch.nan
        with pytest.raises(ValueError, match="the loss must stay finite, got nan"):
            recover(model, texts(), recipe())

    def test_state_of_another_recipe(self, tmp_path):
        recover(tiny(), texts(), recipe(steps=1), folder=tmp_path)
        with pytest.raises(ValueError, match=r"learning_rate \(was 0.003, is 1.0\)"):
            recover(tiny(), texts(), recipe(steps=1, learning_rate=1.0), folder=tmp_path)

    @pytest.mark.parametrize("trained", ["all", "attention"])
    def test_state_of_something_else(self, tmp_path, trained):
        parent = tiny(num_kv_heads=6)
        given = recipe(steps=1, trained=trained, distillation=0.5)
        recover(child_of(parent), texts(), given, folder=tmp_path, parent=parent)
        another = tiny(num_kv_heads=6)
        with torch.no_grad():
            another.model.norm.weight[2] += 1
        other_maps = convert(parent, [HeadMap([0, 1, 0, 1, 0, 2])] * 2)
        for model, batches, teacher, name in (
            (child_of(another), texts(), parent, "weights"),
            (other_maps, texts(), parent, "head maps"),
            (child_of(parent), texts()[1:], parent, "data"),
            (child_of(parent), texts(), another, "parent's weights"),
        ):
            before = copy.deepcopy(model)
            with pytest.raises(ValueError, match=f"other parts than this run: .*{name}"):
                recover(model, batches, given, folder=tmp_path, parent=teacher)
            assert not changed(before, model)

    def test_what_the_child_was_made_from_may_stand_for_its_weights(self, tmp_path):
        model, again = child_of(tiny(num_kv_heads=6)), child_of(tiny(num_kv_heads=6))
        with torch.no_grad():  # as on another machine, which rounds the conversion differently
            again.model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-7
        options = {"folder": tmp_path, "made_from": {"weights": "the same"}}
        recover(model, texts(), recipe(steps=1), **options)
        recover(again, texts(), recipe(steps=1), **options)
        assert not changed(model, again)
        with pytest.raises(ValueError, match=r"weights \(was the same, is others\)"):
            recover(
                again, texts(), recipe(steps=1), folder=tmp_path, made_from={"weights": "others"}
            )

    def test_truncated_state(self, tmp_path):
        recover(tiny(), texts(), recipe(steps=1), folder=tmp_path)
        path = tmp_path / "recovery.pt"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="must be a complete state"):
            recover(tiny(), texts(), recipe(steps=1), folder=tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"trained": "everything"}, "trained must be one of all, attention, lora"),
            ({"steps": 0}, "must be at least 1, got 0 and 1"),
            ({"distillation": 1.5}, r"distillation must lie in \[0, 1\], got 1.5"),
        ],
    )
    def test_recipe(self, change, message):
        with pytest.raises(ValueError, match=message):
            recipe(**change)
