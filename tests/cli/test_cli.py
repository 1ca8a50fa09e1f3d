"""The command line."""

import os
import subprocess
import sys

import pytest

from gqa_kernels import available_backends, cli
from gqa_kernels.backends.dispatch import BACKENDS


def test_backends(capsys):
    assert cli.main(["backends"]) == 0
    out = capsys.readouterr().out
    for name in available_backends():
        assert f"{name}: usable" in out
    assert "  instruction set " in out or "cpu" not in available_backends()


def test_env(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "kernel cache", "OpenMP threads wait"):
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
        (["demo", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere/out.json", "."])
def test_json_that_cannot_be_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.samples.smollm2.require", lambda *_: None)
    path = tmp_path / name
    assert cli.main(["demo", "--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"--json must be a file in an existing, writable folder, got {path}" in error


def test_backend_that_is_not_usable(capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.samples.smollm2.require", lambda *_: None)
    backend = BACKENDS["reference"]
    monkeypatch.setattr(type(backend), "unavailable_reason", lambda self: "out of order")
    assert cli.main(["demo", "--backend", "reference"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gqa-kernels: backend 'reference' can't run ")
    assert "out of order" in error


def test_gpu_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr("gqa_kernels.samples.smollm2.require", lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "--device must be cpu if torch finds no GPU, got cuda" in capsys.readouterr().err


def test_module_waits_passively():
    """Without the variable the process starts itself again with it."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "gqa_kernels", "env"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OpenMP threads wait: PASSIVE" in done.stdout
