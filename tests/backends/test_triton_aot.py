"""Every Triton kernel compiles for the GPUs there are, without spills and within shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def report(*arguments: str, script: str = "resources") -> None:
    # A process of its own: the interpreter that this one may run replaces Triton's compiler.
    done = subprocess.run(
        [sys.executable, "-m", f"tests.emulation.{script}", *arguments],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    "target",
    ["sm_80", "sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_100", "gfx942"))],
)
def test_main_configurations(target):
    report(target)


@pytest.mark.slow
@pytest.mark.parametrize("target", (*TARGETS, "sm_86"))
def test_every_configuration(target):
    report(target, "--all")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_lengths_compile_nothing_again(target):
    report(target, script="compile_keys")
