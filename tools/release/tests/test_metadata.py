"""What setup.py says of the project."""

import os
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

import pytest

from gqa_kernels.native import cuda_build
from gqa_kernels.version import __version__

ROOT = Path(__file__).parents[3]


def metadata(folder: Path, **variables: str):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)
    return HeaderParser().parsestr((folder / "gqa_kernels.egg-info" / "PKG-INFO").read_text())


def test_links_are_those_of_the_repository_that_releases_it(tmp_path):
    about = metadata(
        tmp_path, GITHUB_SERVER_URL="https://example.org", GITHUB_REPOSITORY="some/fork",
        GQA_KERNELS_CUDA="0",
    )  # fmt: skip
    links = dict(line.split(", ") for line in about.get_all("Project-URL"))
    assert links["Source"] == "https://example.org/some/fork"
    assert links["Issues"] == "https://example.org/some/fork/issues"
    assert about["Version"] == __version__ and about["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in about.get_all("License-File")


def test_version_of_a_wheel_with_cuda_kernels(tmp_path):
    toolkit = cuda_build.find_toolkit(os.environ.get("CUDA_HOME"))
    if toolkit is None:
        pytest.skip("nvcc is missing")
    digits = cuda_build.version_digits(toolkit)
    assert digits.isdecimal() and len(digits) == 3
    about = metadata(tmp_path, GQA_KERNELS_CUDA="1")
    assert about["Version"] == f"{__version__}+cu{digits}"
    assert about.get_all("Project-URL") is None or os.environ.get("GITHUB_REPOSITORY")


@pytest.mark.parametrize(
    ("told", "digits"), [("release 12.8, V12.8.61", "128"), ("release 13.0, V1", "130")]
)
def test_version_digits(told, digits):
    assert cuda_build.version_digits(cuda_build.Toolkit(Path("/none"), told)) == digits


def test_a_toolkit_that_names_no_release():
    with pytest.raises(ValueError, match="must name a release, got 'nvcc'"):
        cuda_build.version_digits(cuda_build.Toolkit(Path("/none"), "nvcc"))


def test_every_extra_of_the_readme_exists(tmp_path):
    import re

    about = metadata(tmp_path, GQA_KERNELS_CUDA="0")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), ROOT / "tests" / "README.md"]
    named = {
        extra.strip()
        for page in pages
        for found in re.findall(r"(?:'\.|gqa-kernels)\[([\w, -]+)\]'", page.read_text())
        for extra in found.split(",")
    }
    assert named and named <= set(about.get_all("Provides-Extra"))
    needs = [line for line in about.get_all("Requires-Dist") if 'extra == "hf"' in line]
    assert any(line.startswith("matplotlib") for line in needs)
