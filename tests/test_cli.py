"""The command line."""

import os
import subprocess
import sys

import pytest

from gqa_kernels import available_backends, cli


def test_backends(capsys):
    assert cli.main(["backends"]) == 0
    out = capsys.readouterr().out
    for name in available_backends():
        assert f"{name}: usable" in out


def test_env(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "kernel cache", "OMP_WAIT_POLICY"):
        assert f"{name}: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--new-tokens", "0"], "must be an integer of at least 1, got 0"),
        (["demo", "--new-tokens", "many"], "must be an integer of at least 1, got many"),
        (["demo", "--backend", "abacus"], "invalid choice: 'abacus'"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_json_into_a_missing_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.demo.model.require", lambda *_: None)
    path = tmp_path / "nowhere" / "out.json"
    assert cli.main(["demo", "--json", str(path)]) == 2
    assert "--json must lie in an existing folder, got " in capsys.readouterr().err


def test_backend_that_is_not_usable(capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.demo.model.require", lambda *_: None)
    backend = cli.BACKENDS["reference"]
    monkeypatch.setattr(type(backend), "unavailable_reason", lambda self: "out of order")
    assert cli.main(["demo", "--backend", "reference"]) == 2
    assert "backend reference is not usable here: out of order" in capsys.readouterr().err


def test_module_waits_passively():
    """Without the variable the process starts itself again with it."""
    environment = {k: v for k, v in os.environ.items() if k != cli.WAIT}
    done = subprocess.run(
        [sys.executable, "-m", "gqa_kernels", "env"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{cli.WAIT}: PASSIVE" in done.stdout
