"""The harness from its command line: gate, statuses, files, resuming, comparing."""

import dataclasses
import json
import time

import pytest
import torch

from benchmarks import run
from benchmarks.ops.attention import Problem
from benchmarks.ops.registry import OPS
from benchmarks.report import results as results_file
from benchmarks.report.compare import compare
from benchmarks.report.results import SCHEMA
from gqa_kernels.backends import dispatch
from gqa_kernels.backends.reference import ReferenceBackend

SHAPE = ["--op", "decode", "--shapes", "smollm2-135m:1:40", "--maps", "4-3-2", "--dtype", "float32"]
FAST = ["--device", "cpu", "--seconds", "0.01"]


class Right(ReferenceBackend):
    name = "right"


class Slow(Right):
    def attend(self, call):
        time.sleep(0.01)
        return super().attend(call)


class Wrong(ReferenceBackend):
    """Does what ordinary kernels do to an uneven map: takes the groups for equal."""

    name = "wrong"

    def attend(self, call):
        ratio = call.num_heads // call.num_k_heads
        index = torch.arange(call.num_heads) // ratio
        _, lse = super().attend(call)
        s = call.q @ call.k[:, index].mT * call.scale
        return torch.softmax(s, -1) @ call.v[:, index], lse


class Failing(ReferenceBackend):
    name = "failing"

    def attend(self, call):
        raise RuntimeError("no such kernel")


@pytest.fixture(autouse=True)
def test_backends(monkeypatch):
    for backend in (Right(), Wrong(), Failing()):
        monkeypatch.setitem(dispatch.BACKENDS, backend.name, backend)
    dispatch.forget_choices()


def results(path):
    return json.loads(path.read_text())


def rows(path):
    return {row["contestant"]: row for row in results(path)["rows"]}


def test_a_wrong_backend_is_refused_a_timing(tmp_path):
    path = tmp_path / "out.json"
    arguments = [*SHAPE, *FAST, "--backend", "right", "wrong", "failing", "--json", str(path)]
    assert run.main([*arguments, "--peer", "expand+sdpa", "gqa-sdpa"]) == 1
    found = rows(path)
    assert found["wrong"]["status"] == "wrong" and "exceeds" in found["wrong"]["reason"]
    assert "median" not in found["wrong"] and "gbytes_per_second" not in found["wrong"]
    assert found["failing"]["status"] == "failed"
    assert found["failing"]["reason"] == "RuntimeError: no such kernel"
    assert found["gqa-sdpa"]["status"] == "unsupported"
    assert found["right"]["status"] == found["expand+sdpa"]["status"] == "ok"


def test_json_schema(tmp_path):
    path = tmp_path / "out.json"
    assert (
        run.main([*SHAPE, *FAST, "--backend", "right", "--peer", "none", "--json", str(path)]) == 0
    )
    data = results(path)
    assert data["schema"] == SCHEMA
    for name in ("device", "threads", "commit", "date", "suite", "versions", "contestants"):
        assert data[name], name
    assert data["versions"]["torch"] == torch.__version__
    assert data["limits"]["memory"][0]["rate"] > 0 and data["limits"]["compute"]["float32"] > 0
    row, control = data["rows"]
    assert (control["contestant"], control["kind"]) == ("right, even map", "control")
    assert row["key"] == "decode smollm2-135m 4-3-2 b1 q1 k40 float32 | right"
    assert row["case"]["group_sizes"] == [4, 3, 2]
    assert row["low"] <= row["median"] <= row["high"]
    assert row["bytes"] == 4 * (2 * 9 * 64 + 2 * 3 * 40 * 64)
    assert row["gbytes_per_second"] == pytest.approx(row["bytes"] / row["median"] / 1e9)
    assert row["percent_of_limit"] == pytest.approx(100 * row["limit_seconds"] / row["median"])
    assert row["tokens_per_second"] == pytest.approx(1 / row["median"])


def test_a_slowed_backend_is_flagged(tmp_path, monkeypatch, capsys):
    paths = [str(tmp_path / name) for name in ("before.json", "after.json")]
    measure = [*SHAPE, *FAST, "--backend", "right", "--peer", "none", "--json"]
    assert run.main([*measure, paths[0]]) == 0
    monkeypatch.setitem(dispatch.BACKENDS, "right", Slow())
    dispatch.forget_choices()
    assert run.main([*measure, paths[1]]) == 0
    assert run.main(["--compare", *paths]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert run.main(["--compare", paths[0], paths[0]]) == 0
    assert run.main(["--compare", *paths[::-1]]) == 0  # faster is no regression


def row(median, status="ok", spread=0.0, samples=5):
    timed = {"median": median, "low": median - spread, "high": median + spread} if median else {}
    return {"key": "case | cpu", "status": status, "samples": samples, **timed}


@pytest.mark.parametrize(
    "before, after, mark",
    [
        (row(1.0), row(1.04), ""),
        (row(1.0), row(1.06), "REGRESSION"),
        (row(1.0, spread=0.1), row(1.06, spread=0.1), "slower, within the spread"),
        (row(1.0), row(1.06, samples=1), "slower, within the spread"),
        (row(1.0), row(None, "wrong"), "LOST: wrong"),
        (row(None, "wrong"), row(1.0), ""),
    ],
)
def test_marks(before, after, mark):
    (change,) = compare([before], [after])
    assert change.mark == mark
    assert change.regressed == mark.startswith(("REGRESSION", "LOST"))


def test_resume_skips_what_is_there(tmp_path):
    path = tmp_path / "out.json"
    measure = [*FAST, "--backend", "right", "--peer", "none", "--json", str(path), "--resume"]
    assert run.main([*SHAPE, *measure]) == 0
    first = results(path)["rows"]
    assert run.main([*SHAPE, "--maps", "4-3-2", "giant", *measure]) == 0
    again = results(path)["rows"]
    assert again[:2] == first and len(again) == 4


def test_resume_refuses_other_conditions(tmp_path, capsys):
    path = tmp_path / "out.json"
    measure = [*SHAPE, *FAST, "--backend", "right", "--peer", "none", "--json", str(path)]
    assert run.main(measure) == 0
    data = results(path)
    path.write_text(json.dumps(data | {"commit": "another"}))
    assert run.main([*measure, "--resume"]) == 2
    assert 'commit (was "another", is ' in capsys.readouterr().err
    path.write_text(json.dumps(data | {"versions": {**data["versions"], "torch": "1.0"}}))
    assert run.main([*measure, "--resume"]) == 2
    assert "other parts than this run: versions" in capsys.readouterr().err
    path.write_text(json.dumps(data | {"made_from": {}}))
    assert run.main([*measure, "--resume"]) == 2
    assert "quick (was not given, is false)" in capsys.readouterr().err


def test_budget_stops_and_says_so(tmp_path, capsys):
    path = tmp_path / "out.json"
    measure = [*SHAPE, *FAST, "--backend", "right", "--peer", "none", "--json", str(path)]
    assert run.main([*measure, "--budget", "1e-9"]) == 0
    assert "--resume goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "decode", "--backend", "gpu9000"], "--backend must be among cpu, cuda"),
        (["--peer", "gpu9000"], "--peer must be among"),
        (["--op", "search", "--shapes", "even:9:3"], "family must be among random"),
        (["--op", "search", "--shapes", "planted:9"], "shape of a search must be FAMILY"),
        (["--peer", "fa3-rows"], "fa3-rows is not usable here: needs a CUDA GPU"),
        (["--resume"], "--resume must come with"),
        (["--shapes", "x"], "shape must be MODEL"),
        (["--shapes", "vit-b:1:9", "--maps", "4-3-2"], "map 4-3-2 must have 12 query heads, got 9"),
        (["--quick", "--maps", "nothing"], "must leave cases"),
    ],
)
def test_errors(arguments, message, capsys):
    assert run.main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    assert run.main(["--list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for word in ("llama-3-8b", "uneven-G", "suite gpu", "peer flex", "backend cpu", "not usable"):
        assert word in out


def test_a_case_that_cannot_be_built_fails_alone(tmp_path, monkeypatch):
    build = Problem.build

    def no_room(case, device):
        if case.map == "giant":
            raise torch.OutOfMemoryError("no room")
        return build(case, device)

    failing = dataclasses.replace(OPS["decode"], build=no_room)
    monkeypatch.setitem(OPS, "decode", failing)
    path = tmp_path / "out.json"
    measure = [*FAST, "--backend", "right", "--peer", "none", "--json", str(path)]
    assert run.main([*SHAPE, "--maps", "giant", "4-3-2", *measure]) == 0
    found = {(row["case"]["map"], row["contestant"]): row for row in results(path)["rows"]}
    assert found["giant", "right"]["reason"] == "OutOfMemoryError: no room"
    assert found["giant", "right"]["status"] == "failed"
    assert found["4-3-2", "right"]["status"] == "ok"


def test_a_commit_is_marked_where_the_code_differs(monkeypatch):
    monkeypatch.setattr(results_file, "_git", lambda command, *_: {"rev-parse": "abc"}.get(command))
    assert results_file.commit() == "abc"
    monkeypatch.setattr(results_file, "_git", lambda command, *paths: "abc")
    assert results_file.commit() == "abc+"

    def no_git(*_):
        raise FileNotFoundError

    monkeypatch.setattr(results_file, "_git", no_git)
    monkeypatch.setenv("GIT_COMMIT", "tree-1")
    assert results_file.commit() == "tree-1"
