"""Finding, building and loading the compiled part, each try in a process and a cache of its own.

Most tests put a stand-in in the compiler's place: it logs its calls, takes as long or fails as it
is told, and "links" by copying a library that was built before.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gqa_kernels.native import build, cuda_build, sources

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
[ "$*" = --version ] && exec echo stand-in 1.0
echo "$*" >> {log}
[ -n {failure} ] && {{ echo {failure} >&2; exit 1; }}
sleep {seconds}
from=/dev/null
while [ "$1" != -o ]; do
  [ "$1" = -shared ] && from={library}
  shift
done
exec cp "$from" "$2"
"""
CALL = """
import torch, warnings
from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.testing import assert_attention_close, make_inputs
head_map = HeadMap([0, 1, 1])
q, k, v = make_inputs(1, head_map, 3, 40, 16)
out = asym_gqa_attention(q, k, v, head_map, backend="{backend}")
assert_attention_close(out, q, k, v, head_map)
"""
pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None, reason="no compiled kernels and no compiler"
)


@pytest.fixture(scope="module")
def library() -> str:
    build.load()
    return str(build.library_path())


@pytest.fixture
def machine(tmp_path, library):
    return Machine(tmp_path, library)


class Machine:
    """An empty cache, a compiler, and processes that use the package with them."""

    def __init__(self, folder: Path, library: str):
        self.cache = folder / "cache"
        self.log = folder / "compiler.log"
        self.script = folder / "c++"
        self.library = library
        # No library built ahead of time: a checkout may have one beside its sources.
        self.without_ahead = (
            "from gqa_kernels.native import build, sources; build.LIBRARY = 'none'\n"
        )

    def compiler(self, failure: str = "", seconds: float = 0.0) -> str:
        words = {"log": str(self.log), "failure": failure, "library": self.library}
        words = {name: shlex.quote(word) for name, word in words.items()}
        self.script.write_text(STAND_IN.format(seconds=seconds, **words))
        self.script.chmod(0o755)
        return str(self.script)

    def start(self, code: str, **env: str) -> subprocess.Popen:
        environment = {**os.environ, "GQA_KERNELS_CACHE": str(self.cache), **env}
        return subprocess.Popen(
            [sys.executable, "-c", self.without_ahead + code], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, code: str, **env: str) -> tuple[str, str]:
        process = self.start(code, **env)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out, err

    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def files(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.name != "build.lock")


def test_first_use_builds_and_the_next_reuses(machine):
    cxx = machine.compiler()
    _, err = machine.run(CALL.format(backend="cpu"), CXX=cxx)
    assert err.count("building the CPU kernels (first use only)") == 1
    count = machine.compilations()
    assert count == len(sources.cpu_sources(sources.source_root())) + 1
    assert len(machine.files()) == 1 and machine.files()[0].endswith(".so")

    for env in ({"CXX": cxx}, {"CXX": "/none"}, {"CXX": cxx, "GQA_KERNELS_BUILD": "0"}):
        _, err = machine.run(CALL.format(backend="cpu"), **env)
        assert "building" not in err and machine.compilations() == count


@pytest.mark.slow  # CI and every first use compile them optimised
def test_real_build(machine):
    """With the real compiler; unoptimised, which is much faster."""
    flags = "build.COMPILE_FLAGS = (*build.COMPILE_FLAGS, '-O0')\n"
    _, err = machine.run(flags + CALL.format(backend="cpu"))
    assert "building the CPU kernels" in err and len(machine.files()) == 1


def test_processes_that_start_together_build_once(machine):
    cxx = machine.compiler(seconds=0.2)
    processes = [machine.start(CALL.format(backend="cpu"), CXX=cxx) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("building" in error for error in errors) == 1
    assert machine.compilations() == len(sources.cpu_sources(sources.source_root())) + 1
    assert len(machine.files()) == 1


def test_threads_that_start_together_build_once(machine):
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: build.load(), range(4)))
"""
    _, err = machine.run(code, CXX=machine.compiler(seconds=0.1))
    assert err.count("building") == 1


def test_failing_compiler_gives_its_words_once_and_auto_falls_back(machine):
    code = """
import pytest
with pytest.warns(UserWarning, match="no such luck"):
    asym_gqa_attention(q, k, v, head_map)
for _ in range(2):
    with pytest.raises(NotImplementedError, match="(?s)exited with 1.*no such luck"):
        asym_gqa_attention(q, k, v, head_map, backend="cpu")
"""
    cxx = machine.compiler(failure="fatal error: no such luck")
    machine.run(CALL.format(backend="reference") + code, CXX=cxx)
    assert machine.files() == []
    # Files that compile at the same time may each have failed, but nothing was tried again.
    assert machine.compilations() <= len(sources.cpu_sources(sources.source_root()))


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"CXX": "/none/such"}, "no C++ compiler was found"),
        ({"GQA_KERNELS_BUILD": "0"}, "GQA_KERNELS_BUILD=0"),
    ],
)
def test_reasons_without_compiling(machine, env, reason):
    code = (
        CALL.format(backend="auto")
        + """
from gqa_kernels import available_backends, explain_backend
assert "cpu" not in available_backends()
print(explain_backend(asym_gqa_attention, q, k, v, head_map)["cpu"])
"""
    )
    out, err = machine.run(code, **env)
    assert reason in out and "building" not in err


def test_killed_build_leaves_nothing_in_the_way(machine):
    process = machine.start("build.load()", CXX=machine.compiler(seconds=60))
    deadline = time.monotonic() + 60
    while machine.compilations() == 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert machine.files() and not any(name.endswith(".so") for name in machine.files())

    machine.run(CALL.format(backend="cpu"), CXX=machine.compiler())
    assert len(machine.files()) == 1 and machine.files()[0].endswith(".so")


def test_every_source_is_listed():
    root = sources.source_root()
    listed = [
        *sources.cpu_sources(root),
        *cuda_build.host_sources(root),
        *cuda_build.kernel_sources(root, cuda_build.DEFAULT_ARCHS),
    ]
    assert sorted(listed) == sorted([*root.rglob("*.cpp"), *root.rglob("*.cu")])
    for_ampere = cuda_build.kernel_sources(root, ("80",))
    assert for_ampere and not any("sm90" in path.parts for path in for_ampere)


def test_first_use_builds_the_cuda_kernels_for_the_devices_asked_for(machine, tmp_path):
    """With stand-ins for both compilers; nothing they make can be loaded."""
    cxx, home = machine.compiler(), tmp_path / "cuda"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()
    (home / "bin" / "nvcc").symlink_to(cxx)
    code = """
build._load_library = lambda path: print("loaded", path.name.split("-")[0])
build.load("cuda")
"""
    env = {"CXX": cxx, "CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "8.6 9.0"}
    out, err = machine.run(code, **env)
    assert out.split() == ["loaded", "cpu", "loaded", "cuda"]
    assert "building the CUDA kernels (first use only)" in err
    commands = machine.log.read_text().splitlines()
    kernels = {line.split(" -c ")[1].split()[0]: line for line in commands if ".cu -o" in line}
    root = sources.source_root()
    assert sorted(kernels) == [str(path) for path in sorted((root / "cuda").rglob("*.cu"))]
    for path, line in kernels.items():
        assert ("code=sm_86" in line) == ("/sm90/" not in path) and "code=sm_90a" in line
        assert "compute_80" not in line  # no PTX: the devices are known
    (host,) = (line for line in commands if "attention_cuda.cpp" in line)
    assert "-DGQA_CUDA_ARCHS=86_90a" in host and "-DGQA_CUDA_SM90" in host
    assert "-lcudart_static" in commands[-1] and "-ltorch_cpu" in commands[-1]

    count = machine.compilations()
    machine.run(code, **env)
    assert machine.compilations() == count
    machine.run(code, **{**env, "TORCH_CUDA_ARCH_LIST": "8.0"})
    assert machine.compilations() > count  # another library: it is for other devices
    refused = "try: build.load('cuda')\nexcept RuntimeError as error: print(error)"
    out, _ = machine.run(refused, **{**env, "TORCH_CUDA_ARCH_LIST": "7.5"})
    assert "TORCH_CUDA_ARCH_LIST must list compute capabilities of 8.0 or more, got '7.5'" in out


def test_cuda_toolkit_and_architectures(tmp_path):
    assert cuda_build.find_toolkit(str(tmp_path)) is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho stand-in 1.0\n")
    nvcc.chmod(0o755)
    cuda_build.find_toolkit.cache_clear()
    assert cuda_build.find_toolkit(str(tmp_path)).version == "stand-in 1.0"

    assert cuda_build.parse_archs("8.0;8.6 9.0+PTX 9.0a") == ("80", "86", "90a")
    for bad in ("7.5", "8", "Hopper"):
        with pytest.raises(ValueError, match=f"TORCH_CUDA_ARCH_LIST must list .*got '{bad}'"):
            cuda_build.parse_archs(bad)


def test_cuda_build_is_read_from_the_file(tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(b"\x7fELF" + bytes(100))
    assert cuda_build.build_info(library) is None
    library.write_bytes(bytes(100) + b"gqa_kernels CUDA build 13000 80_90a\0" + bytes(9))
    assert cuda_build.build_info(library) == "CUDA 13.0: sm_80, sm_90a"


@pytest.mark.parametrize(
    "setup, env, reason",
    [
        ("", {"GQA_KERNELS_CUDA": "0"}, "GQA_KERNELS_CUDA=0 forbids"),
        ("torch.cuda.is_available = lambda: False\n", {}, "no CUDA device"),
        ("", {"CUDA_HOME": "/none/such"}, "nvcc is missing (looked at $CUDA_HOME and PATH)"),
        (
            "build._ahead_of_time = lambda part: part == 'cpu' or None\n",
            {"CUDA_HOME": "/none/such"},
            "the installed extension was built without CUDA, and nvcc is missing",
        ),
        ("build._toolkit = lambda: 1\n", {"GQA_KERNELS_BUILD": "0"}, "GQA_KERNELS_BUILD=0"),
        ("torch.cuda.get_device_capability = lambda: (7, 5)\n", {}, "at least (8, 0), got (7, 5)"),
    ],
)
def test_reasons_against_cuda(machine, setup, env, reason):
    """As on a machine with a GPU, unless `setup` says otherwise."""
    code = f"""
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (9, 0)
{setup}
from gqa_kernels.backends.dispatch import BACKENDS
print(BACKENDS["cuda"].unavailable_reason())
"""
    out, _ = machine.run(code, **env)
    assert reason in out
