"""``env`` and ``backends`` where something is broken, which is what they are for."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = {
    "no home": ({"HOME": "~no-such-user/x", "XDG_CACHE_HOME": "~no-such-user/x"}, "home directory"),
    "no such user": ({"GQA_KERNELS_CACHE": "~no-such-user/x"}, "home directory"),
    "no folder": ({"GQA_KERNELS_CACHE": "/dev/null/x"}, "/dev/null/x"),
    "no compiler": ({"CXX": "/none", "GQA_KERNELS_CACHE": "/none"}, "/none in CXX was not found"),
    "no command": ({"CXX": "c++ '"}, "CXX must be a command"),
    "no such instruction set": ({"GQA_KERNELS_CPU_ISA": "bogus"}, "bogus"),
    "no such setting": ({"GQA_KERNELS_CUDA": "maybe"}, "GQA_KERNELS_CUDA must be auto, 0 or 1"),
    "no such build": ({"GQA_KERNELS_BUILD": "maybe"}, "GQA_KERNELS_BUILD=maybe"),
    "no toolkit": ({"CUDA_HOME": "/none"}, "nvcc is missing"),
    "no such device": ({"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST=7.5"),
}


def report(command: str, **env: str) -> str:
    """What a command prints on both streams."""
    inherited = {name: x for name, x in os.environ.items() if name != "GQA_KERNELS_CACHE"}
    with tempfile.TemporaryDirectory() as folder:  # the cache falls back to it
        own = {"OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": folder}
        done = subprocess.run(
            [sys.executable, "-m", "gqa_kernels", command], cwd=ROOT, capture_output=True,
            text=True, env={**inherited, **own, **env}, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("broken", BROKEN)
def test_env_says_what_is_broken(broken):
    env, words = BROKEN[broken]
    said = report("env", **env)
    assert words in said and "Triton interpreter: " in said


@pytest.mark.parametrize("broken", ["no compiler", "no such instruction set", "no such setting"])
def test_backends_says_what_is_broken(broken):
    env, words = BROKEN[broken]
    said = report("backends", **env)
    assert words in said and "\nreference: usable" in said


@pytest.mark.parametrize("content", ["truncated", "foreign owner", "writable"])
def test_env_with_a_broken_cache(tmp_path, content):
    """Nothing of it is loaded, and nothing is compiled for a report."""
    from gqa_kernels.native import sources

    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    library = cache / f"cpu-{sources.source_key('cpu')}-00000000.so"
    library.write_bytes(b"\x7fELF")
    if content == "writable":
        cache.chmod(0o777)
    elif content == "foreign owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(cache, 12345, -1)
    said = report("env", GQA_KERNELS_CACHE=str(cache), TMPDIR=str(tmp_path))
    assert "CPU kernels run on: not known" in said and "compiling" not in said
    assert (f"{cache}, refused" in said) == (content != "truncated")


def test_env_lists_the_variables_that_are_set():
    said = report("env", GQA_KERNELS_BUILD="0", TRITON_INTERPRET="1")
    line = next(line for line in said.splitlines() if line.startswith("variables: "))
    assert "GQA_KERNELS_BUILD=0" in line and "TRITON_INTERPRET=1" in line
