"""Finding, building and loading the compiled part, each try in a process and a cache of its own."""

import os
import signal
import subprocess
import time

import pytest

from gqa_kernels.native import build, compiler, sources

from .machine import CALL


def number_of_commands() -> int:
    return len(sources.cpu_sources(sources.source_root())) + 1  # the last one links


def test_first_use_builds_and_the_next_reuses(machine):
    cxx = machine.compiler()
    _, err = machine.run(CALL.format(backend="cpu"), CXX=cxx)
    count = machine.compilations()
    assert count == number_of_commands() and len(machine.libraries()) == 1
    first, *steps = [line for line in err.splitlines() if line.startswith("gqa_kernels: ")]
    assert "compiling the CPU kernels, once, for about" in first and str(machine.cache) in first
    assert [f"[{i + 1}/{count}]" in step for i, step in enumerate(steps)] == [True] * count
    assert any("host/append, " in step for step in steps) and "linked" in steps[-1]

    for env in ({"CXX": cxx}, {"CXX": "/none"}, {"CXX": cxx, "GQA_KERNELS_BUILD": "0"}):
        _, err = machine.run(CALL.format(backend="cpu"), **env)
        assert "compiling" not in err and machine.compilations() == count


@pytest.mark.slow  # CI and every first use compile them optimised
def test_real_build(machine):
    """With the real compiler; unoptimised, which is much faster."""
    flags = (
        "from gqa_kernels.native import compiler\n"
        "compiler.COMPILE_FLAGS = (*compiler.COMPILE_FLAGS, '-O0')\n"
    )
    _, err = machine.run(flags + CALL.format(backend="cpu"))
    assert "compiling the CPU kernels" in err and len(machine.libraries()) == 1


def test_processes_that_start_together_build_once(machine):
    cxx = machine.compiler(seconds=0.2)
    processes = [machine.start(CALL.format(backend="cpu"), CXX=cxx) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("compiling" in error for error in errors) == 1
    assert machine.compilations() == number_of_commands() and len(machine.libraries()) == 1


def test_threads_that_start_together_build_once(machine):
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: build.load(), range(4)))
"""
    _, err = machine.run(code, CXX=machine.compiler(seconds=0.1))
    assert err.count("compiling") == 1


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
    assert machine.libraries() == []
    # Files that compile at the same time may each have failed, but nothing was tried again.
    assert machine.compilations() < number_of_commands()


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"CXX": "/none/such"}, "the C++ compiler /none/such in CXX was not found: install one"),
        ({"CXX": "c++ 'x"}, 'CXX must be a command, got "c++ \'x"'),
        ({"CXX": "/bin/false"}, "the C++ compiler /bin/false --version failed"),
        ({"PATH": "/none"}, "no C++ compiler was found (c++, g++, clang++): install one"),
        ({"GQA_KERNELS_BUILD": "0"}, "GQA_KERNELS_BUILD=0"),
        ({"GQA_KERNELS_BUILD": "no"}, "GQA_KERNELS_BUILD must be 0 or 1, got 'no'"),
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
    assert reason in out.replace("\\'", "'") and "compiling" not in err


def test_no_ninja(machine):
    code = """
import shutil, sys
sys.modules["ninja"] = None
which = shutil.which
shutil.which = lambda name, **options: None if name == "ninja" else which(name, **options)
print(build.unavailable_reason())
"""
    out, _ = machine.run(code, CXX=machine.compiler())
    assert "ninja was not found: pip install ninja" in out


@pytest.mark.parametrize("group", [False, True], ids=["the process", "with all it started"])
def test_killed_build_leaves_nothing_in_the_way(machine, group):
    process = machine.start("build.load()", new_session=True, CXX=machine.compiler(seconds=1))
    deadline = time.monotonic() + 60
    while machine.compilations() < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    process.wait()
    assert machine.libraries() == []

    _, err = machine.run(CALL.format(backend="cpu"), CXX=machine.compiler())
    assert len(machine.libraries()) == 1
    # What had been compiled was used: each file was compiled once, but for those in work.
    assert machine.compilations() <= number_of_commands() + 3
    assert "what has changed since the last build" in err


def test_ctrl_c_says_what_is_kept(machine):
    process = machine.start("build.load()", new_session=True, CXX=machine.compiler(seconds=0.5))
    deadline = time.monotonic() + 120
    while machine.compilations() < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and machine.libraries() == []
    last = err.splitlines()[-1]
    assert "BuildInterrupted: what was compiled so far is kept in" in last
    assert str(machine.cache) in last and "the next build continues" in last


def test_an_edited_checkout_gets_a_library_of_its_own(machine, tmp_path):
    """Two checkouts share a build folder; a file that differs is compiled, the others are not."""
    code = """
import os
from pathlib import Path
from gqa_kernels.native import build, compiler, sources
root = Path(os.environ["CHECKOUT"])
build.source_root = sources.source_root = lambda: root
build._load_library = lambda path: print(path.name)
build.load()
"""
    builds = []
    for number in (1, 2, 1):
        root = tmp_path / f"checkout{number}"
        for name in ("bindings.cpp", "host/append.cpp", "cpu/append.cpp"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"// {number if name == 'bindings.cpp' else 0}\n")
        out, err = machine.run(code, CHECKOUT=str(root))
        builds.append((out.strip(), err.count("gqa_kernels: [")))
    (first, all_files), (second, one_file), third = builds
    assert first != second and all_files == 3 + 1 and one_file == 1 + 1
    assert third == (first, 0)  # still there


def test_a_library_ahead_of_time_serves_only_the_sources_it_was_built_from(tmp_path, monkeypatch):
    package = tmp_path / "gqa_kernels"
    package.mkdir()
    library = package / "_C.abi3.so"
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setattr(build, "LIBRARY", library.name)
    assert build._ahead_of_time("cpu") is None

    monkeypatch.setattr(build, "source_root", lambda: tmp_path / "csrc")  # a checkout
    for key, served in ((sources.source_key("cuda"), library), ("0123456789abcdef", None)):
        unit = tmp_path / "key.cpp"
        unit.write_text(sources.key_unit(key))
        command = [*compiler.find_compiler().command, "-shared", "-fPIC", "-fvisibility=hidden"]
        subprocess.run([*command, unit, "-o", library], check=True)
        build._facts.cache_clear()
        assert sources.key_in(library) == key and build._ahead_of_time("cpu") == served
        assert build._ahead_of_time("cuda") is None

    monkeypatch.setattr(build, "source_root", lambda: package / "_csrc")  # a wheel
    assert build._ahead_of_time("cpu") == library
