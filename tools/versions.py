"""Versions that the tests ran with: renew the pins, or try the newest and the oldest releases.

::

    python -m tools.versions newest   # the newest of everything; changes nothing
    python -m tools.versions oldest   # the oldest torch and transformers that are supported
    python -m tools.versions renew    # newest, and pin it if the tests pass

Each makes a virtual environment in a temporary folder, installs the project there and runs the
test suite. ``renew`` then writes ``constraints.txt`` and copies it into the ``test`` extra of
``pyproject.toml``, so that ``pip install '.[test]'`` installs what the tests ran with. Further
arguments go to pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT, CONSTRAINTS = ROOT / "pyproject.toml", ROOT / "constraints.txt"
LATEST = "test-latest"  # the extra without pins
# Oldest releases that are supported, with their last patches; see pyproject.toml.
OLDEST = ("torch==2.10.*", "transformers==4.57.*")
# What is pinned: the direct dependencies of the test extra.
PINNED = (
    "accelerate", "expecttest", "gguf", "hypothesis", "matplotlib", "ml_dtypes", "ninja",
    "numpy", "pymoo", "pytest", "pytest-xdist", "rich", "scikit-learn", "scipy",
    "setuptools", "torch", "transformers",
)  # fmt: skip
OLDEST_PYTHON = (3, 10)  # of the project
BEGIN, END = "    # pins: written by tools/versions.py\n", "    # end of pins\n"

# Asked of the environment's own Python: it has the versions.
_REPORT = """
import json, sys
from importlib.metadata import PackageNotFoundError, metadata
found = {}
for name in sys.argv[1:]:
    try:
        about = metadata(name)
    except PackageNotFoundError:
        continue
    found[name] = about["Version"].split("+")[0], about["Requires-Python"] or ""
print(json.dumps(found))
"""


def installed(python: str | Path = sys.executable) -> list[str]:
    """A pin of every package in ``PINNED`` that an environment has: ``["numpy==2.4.6", ...]``."""
    done = subprocess.run(
        [python, "-c", _REPORT, *PINNED], check=True, capture_output=True, text=True
    )
    return [pin(name, *about) for name, about in sorted(json.loads(done.stdout).items())]


def pin(name: str, version: str, requires_python: str) -> str:
    """A requirement for one version, on the Python releases that it runs on.

    Example:
        >>> pin("numpy", "2.4.6", ">=3.11")
        "numpy==2.4.6; python_version >= '3.11'"
    """
    oldest = re.search(r">=?\s*3\.(\d+)", requires_python)
    if oldest is None or (3, int(oldest[1])) <= OLDEST_PYTHON:
        return f"{name}=={version}"
    return f"{name}=={version}; python_version >= '3.{oldest[1]}'"


def write(pins: Sequence[str]) -> None:
    """Write the pins into ``constraints.txt`` and the ``test`` extra."""
    head = "# What the tests ran with; written by `python -m tools.versions renew`.\n"
    CONSTRAINTS.write_text(head + "".join(f"{line}\n" for line in pins))
    before, rest = PYPROJECT.read_text().split(BEGIN)
    _, after = rest.split(END)
    lines = "".join(f"    {json.dumps(line)},\n" for line in pins)
    PYPROJECT.write_text(before + BEGIN + lines + END + after)


def read() -> list[str]:
    """The pins in ``constraints.txt``."""
    lines = CONSTRAINTS.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run(requirements: Sequence[str], pytest: Sequence[str], keep: bool) -> int:
    """Install the project and these requirements in a new environment, and run its tests.

    Args:
        requirements: of pip, besides the project's own.
        pytest: arguments.
        keep: write the pins if the tests pass.

    Returns:
        pytest's exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin/python"
        install = [python, "-m", "pip", "install", "-q", *requirements, f"{ROOT}[{LATEST}]"]
        subprocess.run(install, check=True)
        # The checkout, not the installed copy: tests read files beside the package.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [python, "-m", "pytest", *pytest], cwd=ROOT, env=environment, check=False
        )
        pins = installed(python)
    print("\n".join(pins))
    if keep and done.returncode == 0:
        write(pins)
    return done.returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the tests with other versions.")
    parser.add_argument("which", choices=["newest", "oldest", "renew"])
    arguments, pytest = parser.parse_known_args(argv)
    requirements = OLDEST if arguments.which == "oldest" else ()
    return run(requirements, pytest, keep=arguments.which == "renew")


if __name__ == "__main__":
    raise SystemExit(main())
