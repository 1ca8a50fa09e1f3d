"""Compiling small sources with the real compiler and ninja, as the kernels are compiled."""

import ctypes
import shutil
import subprocess

import pytest

from gqa_kernels.native import compiler

try:
    compiler.find_compiler()
    compiler.find_ninja()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

FILES = {
    "bindings.cpp": b'#include "value.h"\nint host(); int cpu();\n'
    b'extern "C" __attribute__((visibility("default"))) int total() '
    b"{ return kValue + host() + cpu(); }\n",
    "value.h": b"#ifndef VALUE\n#define VALUE 1\n#endif\nconstexpr int kValue = VALUE;\n",
    "host/append.cpp": b"int host() { return 20; }\n",
    "cpu/append.cpp": b"int cpu() { return 300; }\n",
}


@pytest.fixture
def build(tmp_path, capsys):
    """Compiles files; gives what the library returns, and which files were compiled."""

    def build(files: dict[str, bytes]) -> tuple[int, set[str]]:
        with open(tmp_path / "lock", "w") as lock:
            library = compiler.compile_library(
                "cpu", compiler.find_compiler(), None, files, tmp_path / "objects", lock
            )
        loaded = tmp_path / f"{len(list(tmp_path.glob('*.so')))}.so"
        shutil.copy(library, loaded)
        said = [line for line in capsys.readouterr().err.splitlines() if ": [" in line]
        return ctypes.CDLL(str(loaded)).total(), {line.split()[2].strip(",") for line in said}

    return build


def test_only_what_changed_is_compiled(build):
    everything = {"bindings", "host/append", "cpu/append", "linked"}
    assert build(FILES) == (321, everything)  # two sources of the same name
    assert build(FILES) == (321, {"linked"})
    one = {**FILES, "cpu/append.cpp": b"int cpu() { return 400; }\n"}
    assert build(one) == (421, {"cpu/append", "linked"})
    header = {**one, "value.h": b"constexpr int kValue = 5;\n"}
    assert build(header) == (425, {"bindings", "linked"})
    moved = {**header, "isa/x.cpp": header["cpu/append.cpp"]}
    del moved["cpu/append.cpp"]
    assert build(moved) == (425, {"isa/x", "linked"})
    assert build(FILES) == (321, everything - {"host/append"})


@pytest.mark.parametrize("wrapper", [False, True])
def test_a_compiler_with_arguments(build, tmp_path, monkeypatch, wrapper):
    script = tmp_path / "my wrapper"
    script.write_text(f"#!/bin/sh\necho called >> '{tmp_path}/log'\nexec \"$@\"\n")
    script.chmod(0o755)
    path = compiler.find_compiler().command[0]
    monkeypatch.setenv("CXX", f"'{script}' {path} -DVALUE=7" if wrapper else f"{path} -DVALUE=7")
    assert build(FILES)[0] == 327
    assert (tmp_path / "log").exists() == wrapper
    monkeypatch.setenv("CXX", f"{path} -DVALUE=8")
    assert build(FILES) == (328, {"bindings", "host/append", "cpu/append", "linked"})


def test_what_the_compiler_says_is_in_the_error(build):
    with pytest.raises(RuntimeError) as caught:
        build({**FILES, "host/append.cpp": b"int host() { return kNoSuchThing; }\n"})
    message = str(caught.value)
    assert "exited with 1 for host/append:" in message and "kNoSuchThing" in message
    assert "Traceback" not in message and len(message.splitlines()) <= compiler.ERROR_LINES + 1
    assert build(FILES)[0] == 321


def test_a_lock_that_a_killed_build_left_is_not_waited_for(build, tmp_path):
    build(FILES)
    (folder,) = (tmp_path / "objects").iterdir()
    (folder / "lock").touch()  # torch's FileBaton
    assert build(FILES) == (321, {"linked"})


def test_compilers_inherit_the_lock(build, tmp_path, monkeypatch):
    """It is held as long as any of them runs, whatever becomes of the process that started them."""
    script = tmp_path / "c++"
    path = compiler.find_compiler().command[0]
    script.write_text(f'#!/bin/sh\nls -l /proc/self/fd >> "{tmp_path}/fds"\nexec {path} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    build(FILES)
    listing = (tmp_path / "fds").read_text()
    assert listing.count(f"-> {tmp_path}/lock") == 4  # three files and the link


def test_the_compilers_version_is_part_of_its_key(tmp_path, monkeypatch):
    script = tmp_path / "c++"
    keys = set()
    for version in ("1.0", "2.0"):
        script.write_text(f"#!/bin/sh\necho {version}\n")
        script.chmod(0o755)
        compiler._version.cache_clear()
        for arguments in ("", " -m64"):
            monkeypatch.setenv("CXX", f"{script}{arguments}")
            keys.add(compiler.find_compiler().key)
    assert len(keys) == 4


def test_a_compiler_that_hangs_or_is_no_program(tmp_path, monkeypatch):
    script = tmp_path / "c++"
    script.write_text("not a program")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(RuntimeError, match=r"c\+\+ doesn't run: .*Exec format error"):
        compiler.find_compiler()
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: (_ for _ in ()).throw(subprocess.TimeoutExpired("x", 60)),
    )
    with pytest.raises(RuntimeError, match=r"c\+\+ doesn't run: .*timed out"):
        compiler.find_compiler()
