"""Where libraries are kept, and which are loaded."""

import os
import stat
import tempfile
import warnings
from pathlib import Path

import pytest

from gqa_kernels.native import library_cache

from .machine import CALL

NOBODY = "~no-such-user-anywhere/x"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's cache, in a machine of its own: other temporary files, nothing said yet."""
    monkeypatch.setenv("GQA_KERNELS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(library_cache, "_said", set())
    library_cache._own_fallback.cache_clear()
    yield tmp_path / "cache"
    library_cache._own_fallback.cache_clear()


@pytest.fixture
def give_away(monkeypatch):
    """Makes a file another user's, as far as this process can tell."""

    def give_away(path: Path):
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
        else:
            other = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: other)

    return give_away


def kept(folder: Path, name: str = "cpu-1-2.so", content: bytes = b"library") -> Path:
    built = folder.parent / "built"
    built.write_bytes(content)
    library_cache.keep(built, folder / name)
    return folder / name


def test_the_folder_is_the_users_alone(folder):
    assert library_cache.folders() == []
    assert library_cache.writable_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert library_cache.folders() == [folder]


def test_what_was_kept_is_found(folder):
    library = kept(library_cache.writable_folder())
    assert library_cache.find("cpu-1-*.so") == library and library.read_bytes() == b"library"
    assert library_cache.find("cpu-3-*.so") is None
    kept(folder, content=b"newer")
    assert library_cache.is_intact(library) and library.read_bytes() == b"newer"
    assert not list(folder.glob(".new-*"))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no hash", "hash of another", "folder"])
def test_what_is_not_as_it_was_kept_is_not_loaded(folder, damage):
    library = kept(library_cache.writable_folder())
    hash_file = library.with_name(library.name + ".sha256")
    if damage == "truncated":
        library.write_bytes(library.read_bytes()[:3])
    elif damage == "foreign":
        library.write_bytes(b"something else")
    elif damage == "no hash":
        hash_file.unlink()
    elif damage == "hash of another":
        hash_file.write_text("0" * 64)
    else:
        library.unlink()
        library.mkdir()
    assert library_cache.find("*.so") is None
    assert library_cache.candidates("*.so") == [library]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused_once(folder, mode):
    kept(library_cache.writable_folder())
    folder.chmod(mode)
    with pytest.warns(UserWarning, match=r"cache is writable by other users.*chmod go-w"):
        assert library_cache.find("*.so") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library_cache.find("*.so") is None
    with pytest.warns(UserWarning, match="kept in .*gqa_kernels-.* instead"):
        assert library_cache.writable_folder().parent == folder.parent / "tmp"


def test_a_folder_of_another_user_is_refused(folder, give_away):
    kept(library_cache.writable_folder())
    give_away(folder)
    with pytest.warns(UserWarning, match="belongs to user .* must be yours or root's"):
        assert library_cache.find("*.so") is None
    with pytest.warns(UserWarning, match="belongs to user"):
        assert library_cache.writable_folder() != folder


def test_a_library_that_others_wrote_or_can_write_is_not_loaded(folder, give_away):
    library = kept(library_cache.writable_folder())
    library.chmod(0o775)
    assert library_cache.find("*.so") is None
    library.chmod(0o755)
    assert library_cache.find("*.so") == library
    give_away(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert library_cache.find("*.so") is None


@pytest.mark.parametrize("trap", ["link", "writable", "file"])
def test_a_fallback_that_somebody_prepared_is_not_used(folder, monkeypatch, trap):
    monkeypatch.setenv("GQA_KERNELS_CACHE", NOBODY)
    fallback = Path(tempfile.gettempdir()) / f"gqa_kernels-{os.geteuid()}"
    (folder.parent / "theirs").mkdir()
    if trap == "link":
        fallback.symlink_to(folder.parent / "theirs")
    elif trap == "file":
        fallback.touch()
    else:
        fallback.mkdir()
        fallback.chmod(0o777)
    with pytest.warns(UserWarning, match="instead"):
        chosen = library_cache.writable_folder()
    assert chosen != fallback and stat.S_IMODE(chosen.stat().st_mode) == 0o700
    with pytest.warns(UserWarning):
        assert fallback not in library_cache.folders()


@pytest.mark.parametrize(
    "env",
    [
        {"GQA_KERNELS_CACHE": NOBODY},
        {"GQA_KERNELS_CACHE": "", "XDG_CACHE_HOME": NOBODY},
        {"GQA_KERNELS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "no/home"},
        {"GQA_KERNELS_CACHE": "/dev/null/x"},
        {"GQA_KERNELS_CACHE": "/proc/x"},
    ],
)
def test_no_usable_place_for_a_cache(folder, monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="set GQA_KERNELS_CACHE to a folder of your own"):
        chosen = library_cache.writable_folder()
    assert chosen.parent == folder.parent / "tmp" and stat.S_IMODE(chosen.stat().st_mode) == 0o700
    library = kept(chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert library_cache.find("*.so") == library
    assert library_cache.writable_folder() == chosen


UNKNOWN_USER = """
import os, pwd
for name in ("HOME", "XDG_CACHE_HOME", "GQA_KERNELS_CACHE"):
    os.environ.pop(name, None)
pwd.getpwuid = {}.__getitem__  # KeyError, as in a container without such a user
"""


@pytest.mark.parametrize("before", ["", UNKNOWN_USER], ids=["no such home", "unknown user"])
def test_calls_without_a_home(machine, tmp_path, before):
    """They build among the temporary files; the second process finds what the first has built."""
    (tmp_path / "tmp").mkdir()
    env = {
        "CXX": machine.compiler(), "GQA_KERNELS_CACHE": NOBODY, "TMPDIR": str(tmp_path / "tmp"),
    }  # fmt: skip
    _, err = machine.run(before + CALL.format(backend="cpu"), **env)
    assert err.count("kept in") and "can't be found" in err
    count = machine.compilations()
    _, err = machine.run(before + CALL.format(backend="cpu"), **env)
    assert machine.compilations() == count and "can't be found" in err


def test_a_truncated_library_is_built_again(machine):
    cxx = machine.compiler()
    machine.run("build.load()", CXX=cxx)
    (name,) = machine.libraries()
    count = machine.compilations()
    (machine.cache / name).write_bytes(machine.library.read_bytes()[:4096])  # loading it: SIGBUS
    machine.run(CALL.format(backend="cpu"), CXX=cxx)
    assert machine.compilations() == count + 1  # linked
    assert (machine.cache / name).read_bytes() == machine.library.read_bytes()

    (machine.cache / name).write_bytes(b"")
    code = CALL.format(backend="auto") + "print(build.library_path(), build.unavailable_reason())"
    out, err = machine.run(code, CXX="/none")  # and where that can't be done
    reason = "the C++ compiler /none in CXX was not found"
    assert out.startswith(f"None {reason}")
    assert "runs the eager reference" in err and reason in err


def test_a_read_only_cache_of_another_compiler(machine):
    machine.run("build.load()", CXX=machine.compiler())
    count = machine.compilations()
    read_only = """
import os
access = os.access
os.access = lambda path, mode, **options: not mode & os.W_OK and access(path, mode, **options)
"""
    _, err = machine.run(read_only + CALL.format(backend="cpu"), CXX="c++")
    assert "compiling" not in err and machine.compilations() == count
