"""The command line."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from gqa_kernels import __version__, available_backends, cli
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.cli import arguments, demo, environment
from gqa_kernels.native import compiler


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
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--new-tokens", "0"], "must be an integer of at least 1, got 0"),
        (["demo", "--new-tokens", "many"], "must be an integer of at least 1, got many"),
        (["demo", "--backend", "abacus"], "invalid choice: 'abacus'"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["demo", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["demo", "--seeds", "3"], "gqa-kernels demo: unknown arguments: --seeds 3"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["nowhere/out.json", "."])
def test_json_that_cannot_be_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda _: pytest.fail("it must be refused before"))
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


COMMANDS = [module for modules in cli.GROUPS.values() for module in modules]


def test_without_a_command_one_screen_shows_them_all(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    for module in COMMANDS:
        assert any(line.endswith(module.SUMMARY) for line in lines)


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__.split(".")[-1])
def test_help_of_a_command_has_an_example_that_parses(module, capsys):
    program, name, *options = shlex.split(module.EXAMPLE)
    assert program == "gqa-kernels" and cli.parser().parse_args([name, *options]).run is module.run
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"example:\n  {module.EXAMPLE}\n" in text and cli.EXIT_STATUS in text
    assert "--json FILE" in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_json_of_backends(tmp_path, capsys):
    path = tmp_path / "backends.json"
    assert cli.main(["backends", "--json", str(path)]) == 0
    assert "reference: usable" in capsys.readouterr().out
    assert cli.main(["backends", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "reference: usable" in printed.err
    found = json.loads(path.read_text())
    assert found == json.loads(printed.out) and list(found["backends"]) == list(BACKENDS)
    usable = [name for name, each in found["backends"].items() if each["usable"]]
    assert usable == available_backends()


def test_json_of_env(capsys, monkeypatch):
    monkeypatch.setenv("GQA_KERNELS_BUILD", "1")
    assert cli.main(["env", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["build at first use"] == "on"
    assert found["variables"]["GQA_KERNELS_BUILD"] == "1"


def test_choices_of_the_demo_are_the_backends():
    assert tuple(BACKENDS) == arguments.BACKENDS


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )  # fmt: skip


def test_help_does_not_load_torch():
    done = run_python(
        "import sys\nfrom gqa_kernels.cli import main\nmain([])\nprint('torch' in sys.modules)"
    )
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize("command", ["env", "backends", "inspect nowhere"])
def test_ctrl_c_while_torch_is_loaded(command, tmp_path):
    """A torch that never finishes loading, and an interrupt: one line."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    done = run_python(f"{code}from gqa_kernels.cli import main\nsys.exit(main({command.split()}))")
    assert done.returncode == 130
    assert done.stderr == "gqa-kernels: interrupted; nothing was kept\n"


def test_ctrl_c_during_a_build(capsys, monkeypatch):
    def interrupted(_):
        raise compiler.BuildInterrupted("objects are kept in a folder")

    monkeypatch.setattr(environment, "run", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "gqa-kernels: interrupted; objects are kept in a folder\n"


@pytest.mark.parametrize("command", ["env", "backends"])
def test_torch_that_is_broken(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: no such file')\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    done = run_python(f"{code}from gqa_kernels.cli import main\nsys.exit(main([{command!r}]))")
    if command == "env":
        assert done.returncode == 0 and "threads: not known: libtorch.so: no such" in done.stdout
        assert "C++ compiler: " in done.stdout and not done.stderr
    else:
        assert done.returncode == 2 and done.stderr == "gqa-kernels: libtorch.so: no such file\n"


def test_threads_wait_passively():
    """OpenMP reads the variable when torch is loaded, which a command does after it was set."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "gqa_kernels", "env"],
        env={**environment, "OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OpenMP threads wait: PASSIVE" in done.stdout
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
