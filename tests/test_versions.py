"""The pins of tested versions: one list, in two places."""

import sys

import pytest

from gqa_kernels.integrations.transformers import versions as transformers
from tools import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture
def extras():
    return tomllib.loads(versions.PYPROJECT.read_text())["project"]["optional-dependencies"]


def test_the_test_extra_pins_what_the_constraints_say(extras):
    assert extras["test"] == [f"gqa-kernels[{versions.LATEST}]", *versions.read()]
    assert all("==" in line for line in versions.read())


def test_oldest_and_newest_are_those_of_the_package(extras):
    project = tomllib.loads(versions.PYPROJECT.read_text())["project"]
    oldest = dict(line.removesuffix(".*").split("==") for line in versions.OLDEST)
    assert f"torch>={oldest['torch']}" in project["dependencies"]
    assert f"transformers>={oldest['transformers']}" in extras["hf"]
    assert oldest["transformers"] == transformers.OLDEST
    pinned = dict(line.split(";")[0].split("==") for line in versions.read())
    assert transformers.release(pinned["transformers"]) == transformers.release(transformers.NEWEST)


def test_pins_respect_the_python_that_a_version_needs():
    assert versions.pin("a", "1.2", ">=3.10") == "a==1.2"
    assert versions.pin("a", "1.2", "") == "a==1.2"
    assert versions.pin("a", "1.2", ">=3.11, <4") == "a==1.2; python_version >= '3.11'"


def test_writing(tmp_path, monkeypatch):
    """Only the pins change, and what is written is read back."""
    text = versions.PYPROJECT.read_text()
    for name in ("PYPROJECT", "CONSTRAINTS"):
        monkeypatch.setattr(versions, name, tmp_path / name)
    versions.PYPROJECT.write_text(text)
    versions.write(["a==1", "b==2; python_version >= '3.11'"])
    assert versions.read() == ["a==1", "b==2; python_version >= '3.11'"]
    extra = tomllib.loads(versions.PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert extra["test"][1:] == versions.read()
    versions.write(versions.installed())
    again = versions.PYPROJECT.read_text()
    assert again.split(versions.BEGIN)[0] == text.split(versions.BEGIN)[0]
    assert again.split(versions.END)[1] == text.split(versions.END)[1]
    assert any(line.startswith("torch==") for line in versions.read())


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("which", ["newest", "oldest", "renew"])
def test_commands(monkeypatch, which, status):
    """What they install and run; pins are written by renew alone, if the tests pass."""
    calls, written = [], []

    def run(command, **_):
        calls.append([str(part) for part in command])
        return type("Done", (), {"returncode": status})()

    monkeypatch.setattr(versions.subprocess, "run", run)
    monkeypatch.setattr(versions, "installed", lambda python: ["a==1"])
    monkeypatch.setattr(versions, "write", written.append)
    assert versions.main([which, "-k", "attention"]) == status
    _, pip, pytest_ = calls
    assert pip[-1] == f"{versions.ROOT}[test-latest]"
    assert [part for part in pip if part.startswith(("torch", "transformers"))] == (
        list(versions.OLDEST) if which == "oldest" else []
    )
    assert pytest_[-2:] == ["-k", "attention"]
    assert written == ([["a==1"]] if which == "renew" and status == 0 else [])


def test_ci_installs_the_pinned_torch():
    """``.ci/run`` installs torch first, to get the smaller CPU build, so it repeats the version."""
    torch = next(line for line in versions.read() if line.startswith("torch=="))
    assert torch in (versions.ROOT / ".ci/run").read_text()
