"""The files and commands that the README and the other pages name exist."""

import re
import shlex
from importlib.util import find_spec

import pytest

from benchmarks.run import _parser as benchmarks_parser
from gqa_kernels.cli import parser

from .pages import FENCED, PAGES, ROOT

OWN = ("gqa_kernels.", "benchmarks.", "tests.", "tools.")  # modules


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_commands_exist_and_take_their_options():
    seen = []
    for page in PAGES:
        for kind, block in FENCED.findall(page.read_text()):
            lines = block.replace("\\\n", " ").splitlines() if kind in ("", "bash") else []
            for command in (part for line in lines for part in line.split("&&")):
                match shlex.split(command, comments=True):
                    case ["gqa-kernels", *arguments]:
                        parser().parse_args(arguments)
                    case ["python", "-m", "benchmarks.run", *arguments]:
                        benchmarks_parser().parse_args(arguments)
                    case ["python", "-m", module, *_] if module.startswith(OWN):
                        assert find_spec(module), command
                    case ["bash", script, *_]:
                        assert (ROOT / script).exists(), command
                    case _:
                        continue
                seen.append(command)
    assert len(seen) > 20
