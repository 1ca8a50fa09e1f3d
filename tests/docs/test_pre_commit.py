"""pre-commit runs the versions of the linters that the extra `lint` pins."""

import re

from .pages import ROOT

PINNED = dict(
    re.findall(
        r'"([\w-]+)==([\d.]+)"',
        re.search(r"^lint = \[.*?\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[0],
    )
)


def test_versions_are_those_of_the_lint_extra():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = dict(re.findall(r"repo: \S+/(\S+)\n\s+rev: v([\d.]+)", config))
    names = {"ruff-pre-commit": "ruff", "mirrors-clang-format": "clang-format",
             "mirrors-mypy": "mypy", "codespell": "codespell"}  # fmt: skip
    assert {names[hook]: version for hook, version in hooks.items()} == PINNED
