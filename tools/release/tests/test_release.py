"""Wheels of a small library: what it needs, what it exports, how it is packed and described."""

import ctypes
import json
import platform as machine
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("auditwheel")
pytest.importorskip("cyclonedx")
elffile = pytest.importorskip("elftools.elf.elffile")

from tools.release import library, wheels  # noqa: E402
from tools.release.__main__ import SUMS, describe  # noqa: E402
from tools.release.platforms import PLATFORMS  # noqa: E402

# What our sources take of newer systems than the wheels are for.
SOURCE = """
#include <cmath>
#include <memory>
#include <sstream>
#include <vector>
extern "C" __attribute__((visibility("default"))) int gqa_kernels_value(double x, long n) {
  std::ostringstream text;
  text << std::log(x) + std::pow(x, 2.0);
  auto many = std::make_shared<std::vector<int>>(static_cast<size_t>(n), 7);
  return static_cast<int>(many->size() + text.str().size());
}
void stranger() {}
"""
METADATA = """Metadata-Version: 2.4
Name: gqa-kernels
Version: 9.9
Summary: A test
License-Expression: Apache-2.0
Requires-Dist: numpy
Requires-Dist: rich>=13; extra == "hf"
"""
LINUX = [name for name, each in PLATFORMS.items() if each.manylinux]


@pytest.fixture(params=LINUX)
def platform(request):
    found = PLATFORMS[request.param]
    if shutil.which(found.compiler) is None:
        pytest.skip(f"{found.compiler} is not installed")
    return found


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "csrc"
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / "value.cpp").write_text(SOURCE)
    return root


@pytest.fixture
def pure_wheel(tmp_path):
    root, about = tmp_path / "gqa_kernels-9.9", "gqa_kernels-9.9.dist-info"
    files = {
        "gqa_kernels/__init__.py": "",
        f"{about}/METADATA": METADATA,
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    command = [sys.executable, "-m", "wheel", "pack", "--dest-dir", str(tmp_path), str(root)]
    subprocess.run(command, check=True)
    return tmp_path / "gqa_kernels-9.9-py3-none-any.whl"


def needed_versions(path: Path) -> set[tuple[str, tuple[int, ...]]]:
    """As ``("GLIBC", (2, 17))``."""
    with open(path, "rb") as file:
        section = elffile.ELFFile(file).get_section_by_name(".gnu.version_r")
        names = [aux.name for _, group in section.iter_versions() for aux in group]
    pairs = [name.split("_") for name in names]
    return {(name, tuple(map(int, version.split(".")))) for name, version in pairs}


def test_a_library_needs_no_newer_system_and_exports_its_own_functions(platform, sources, tmp_path):
    built = library.build_library(platform, sources, tmp_path / "objects")
    versions = needed_versions(built)
    assert max(v for name, v in versions if name == "GLIBC") <= (2, 28)
    assert max(v for name, v in versions if name == "GLIBCXX") <= (3, 4, 25)
    if machine.machine() in platform.wheel_tag:
        function = ctypes.CDLL(str(built)).gqa_kernels_value
        function.argtypes = (ctypes.c_double, ctypes.c_long)
        assert function(1.0, 5) == 5 + len("1")


def test_without_those_definitions_it_would(platform, sources, tmp_path, monkeypatch):
    """The test above can fail."""
    plain = platform._replace(compile_flags=(), link_flags=("-s",))
    monkeypatch.setattr(library, "check_symbols", lambda _: None)
    (tmp_path / "empty.cpp").touch()
    monkeypatch.setattr(library.manylinux, "SOURCE", tmp_path / "empty.cpp")
    versions = needed_versions(library.build_library(plain, sources, tmp_path / "objects"))
    assert {("GLIBC", (2, 29)), ("GLIBC", (2, 32))} <= versions


@pytest.mark.parametrize("fault", ["a private function of torch", "strangers exported"])
def test_refusals(platform, sources, tmp_path, fault):
    if fault == "a private function of torch":
        text = SOURCE.replace("return static", "torchPrivate(); return static")
        (sources / "cpu" / "value.cpp").write_text(f'extern "C" void torchPrivate();\n{text}')
        names = r"no known version: \['torchPrivate'\]"
    else:
        platform = platform._replace(link_flags=("-Wl,--export-dynamic",))
        names = "must export its own functions only"
    with pytest.raises(RuntimeError, match=names):
        library.build_library(platform, sources, tmp_path / "objects")


def test_a_compiler_that_fails(platform, sources, tmp_path):
    (sources / "cpu" / "value.cpp").write_text("#error no such luck\n")
    with pytest.raises(subprocess.CalledProcessError):
        library.build_library(platform, sources, tmp_path / "objects")


def test_packed_and_described(platform, sources, pure_wheel, tmp_path):
    out = tmp_path / "dist"
    out.mkdir()
    shutil.copy(pure_wheel, out)
    built = library.build_library(platform, sources, tmp_path / "objects")
    wheel = wheels.pack_wheel(pure_wheel, built, platform, out, tmp_path / "scratch")
    assert wheel.name == f"gqa_kernels-9.9-py3-none-{platform.wheel_tag}.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("gqa_kernels/_C.abi3.so") == built.read_bytes()
        about = archive.read("gqa_kernels-9.9.dist-info/WHEEL").decode()
        assert f"Tag: py3-none-{platform.wheel_tag}" in about and "Purelib: false" in about
        assert "_C.abi3.so,sha256=" in archive.read("gqa_kernels-9.9.dist-info/RECORD").decode()

    describe(out)
    done = subprocess.run(["sha256sum", "--check", SUMS], cwd=out, check=True, capture_output=True)
    assert done.stdout.count(b": OK") == 3  # two wheels and the SBOM
    bill = json.loads((out / "gqa_kernels-9.9.cdx.json").read_text())
    assert [each["name"] for each in bill["components"]] == ["numpy"]  # no extra's
    package = bill["metadata"]["component"]
    assert package["licenses"] == [{"expression": "Apache-2.0"}]
    assert {each["name"] for each in package["components"]} == {pure_wheel.name, wheel.name}


def test_a_library_for_newer_systems_is_not_packed(platform, sources, pure_wheel, tmp_path,
                                                   monkeypatch):  # fmt: skip
    monkeypatch.setattr(wheels, "GLIBC_MINOR", 5)
    built = library.build_library(platform, sources, tmp_path / "objects")
    with pytest.raises(RuntimeError, match=f"must be {platform.wheel_tag}, got "):
        wheels.pack_wheel(pure_wheel, built, platform, tmp_path, tmp_path / "scratch")
