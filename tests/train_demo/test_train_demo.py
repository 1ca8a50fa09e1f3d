"""train-demo: it learns, goes on where it was cut off, and pools what the search found."""

import json
from dataclasses import replace

import pytest
import torch

from gqa_kernels import HeadMap
from gqa_kernels.cli import main
from gqa_kernels.train_demo.methods import METHODS, pool, searched_maps, start
from gqa_kernels.train_demo.run import run
from gqa_kernels.train_demo.settings import Settings
from gqa_kernels.train_demo.tasks import TASK_CLASSES, loss
from gqa_kernels.train_demo.training import train

TINY = replace(
    Settings().quick(), seeds=1, pretrain_steps=4, steps=2, evaluate_every=2, batch=2,
    length=12, window=1,
)  # fmt: skip


@pytest.fixture
def console():
    from rich.console import Console

    return Console(quiet=True)


def test_quick_command(tmp_path, capsys):
    """The command itself, on one task with fewer seeds."""
    assert main(["train-demo", "--quick", "--task", "digits", "--seeds", "1", "--folder",
                 str(tmp_path)]) == 0  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    outcomes = {run["method"]: run for run in report["outcomes"]}
    assert set(outcomes) == set(METHODS) == set(capsys.readouterr().out.split()) & set(METHODS)
    assert (tmp_path / "losses.svg").stat().st_size > 1000
    rows = [row.split(" | ") for row in (tmp_path / "report.md").read_text().splitlines()]
    assert {row[0].strip("| ") for row in rows if len(row) == 5} > set(METHODS)
    for method, outcome in outcomes.items():
        heads = report["settings"]["num_heads"]
        kv_heads = heads if method == "mha" else report["settings"]["num_kv_heads"]
        assert outcome["num_kv_heads"] == kv_heads
        assert all(sum(s) == heads and len(s) == kv_heads for s in outcome["group_sizes"])
        losses = outcome["history"]["losses"]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", TASK_CLASSES)
def test_training_lowers_the_loss(name):
    settings = replace(TINY, batch=8, length=32)
    task = TASK_CLASSES[name](settings)
    torch.manual_seed(0)
    model = task.model(4)
    batch = task.batch(0, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(model, *batch)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    task = TASK_CLASSES["digits"](TINY)

    def trained(path, *lengths):
        for steps in lengths:
            torch.manual_seed(0)
            model = task.model(4, "dgqa-ema")
            history = train(model, task, 0, steps, 1e-3, 0, tmp_path / path, lambda n: None)
        return model.state_dict(), history

    whole, history = trained("whole.pt", 8)
    # The learning rate warms up over all steps, so both are trained for 8 of them.
    cut = tmp_path / "cut.pt"
    torch.manual_seed(0)
    model = task.model(4, "dgqa-ema")

    class CutOff(Exception):
        pass

    def stop_after_five(n, seen=[0]):  # noqa: B006
        seen[0] += n
        if seen[0] == 5:
            raise CutOff

    with pytest.raises(CutOff):
        train(model, task, 0, 8, 1e-3, 0, cut, stop_after_five)
    resumed, resumed_history = trained("cut.pt", 8)
    assert resumed_history == history
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finished_runs_are_not_run_again(tmp_path, console, monkeypatch):
    settings = replace(TINY, tasks=("digits",), methods=("even",))
    first = run(settings, tmp_path, console)
    monkeypatch.setattr("gqa_kernels.train_demo.training.loss", None)  # training would fail
    assert run(settings, tmp_path, console).outcomes == first.outcomes
    with pytest.raises(ValueError, match=r"steps \(was 2, is 3\)"):
        run(replace(settings, steps=3), tmp_path, console)
    with pytest.raises(ValueError, match=r"batch \(was 2, is 3\)"):
        run(replace(settings, batch=3), tmp_path, console)


def test_a_checkpoint_of_another_start_or_other_data(tmp_path):
    task = TASK_CLASSES["digits"](TINY)

    def trained(seed, task):
        torch.manual_seed(seed)
        return train(task.model(4), task, 0, 1, 1e-3, 0, tmp_path / "one.pt", lambda n: None)

    trained(0, task)
    with pytest.raises(ValueError, match="other parts than this run: weights"):
        trained(1, task)
    task.images[0] += 1
    with pytest.raises(ValueError, match="other parts than this run: data"):
        trained(0, task)
    (tmp_path / "one.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="must be a complete state"):
        trained(0, task)


def test_pooling_averages_groups():
    weight = torch.randn(6, 5)  # 3 heads of 2
    pooled = pool(weight, HeadMap([1, 0, 1]))
    torch.testing.assert_close(pooled[:2], weight[2:4])
    torch.testing.assert_close(pooled[2:], (weight[:2] + weight[4:]) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_methods_start_from_the_trained_model(method):
    task = TASK_CLASSES["text"](TINY)
    torch.manual_seed(0)
    trained = task.model(TINY.num_heads)
    inputs, _ = task.batch(0, 0)
    model = start(method, task, trained, 0)
    if method == "mha":
        torch.testing.assert_close(model(inputs), trained(inputs))
    assert model.blocks[0].attention.allocation is None or method in ("kdgqa", "dgqa-ema")


def test_search_finds_copied_heads():
    """Heads 0, 3, 5 are one head three times, 1 and 6 another: pooling them loses nothing."""
    task = TASK_CLASSES["text"](replace(TINY, num_kv_heads=5))
    torch.manual_seed(0)
    model = task.model(8)
    with torch.no_grad():
        for block in model.blocks:
            for projection in (block.attention.k_proj, block.attention.v_proj):
                heads = projection.weight.unflatten(0, (8, -1))
                heads[3] = heads[5] = heads[0]
                heads[6] = heads[1]
    for head_map in searched_maps(task, model, 0):
        assert set(head_map.groups) == {(0, 3, 5), (1, 6), (2,), (4,), (7,)}
    torch.manual_seed(0)
    inputs, _ = task.batch(0, 0)
    torch.testing.assert_close(start("searched", task, model, 0)(inputs), model(inputs))
